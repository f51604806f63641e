#!/usr/bin/env python
"""Two processes on one GPU: the copy of blocks, decode steps beside copies, handoffs over HTTP, restarts, load.

    scripts/bench_transfer.py MODEL_DIR [--parts gather decode handoff restart load] [--json FILE]

MODEL_DIR needs config.json and tokenizer files only: weights are random. Without a GPU: demo --device cpu --parts host
handoff.
"""

import argparse
import ctypes
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import torch

from baton.kv_transfer.contract import Pool, Pull, Transport
from baton.kv_transfer.greeting import Greeting, greet
from baton.kv_transfer.pipeline import Pipeline
from baton.kv_transfer.source import PeerSource
from baton.kv_transfer.transports import open_transports
from baton.proto.curve import FILE_NAME, create_key, load_key
from baton.proto.layout import Group, KVLayout
from baton.proto.lifecycle import HANDOFF_PARTS, handoff_parts
from baton.proto.messages import Peer
from baton.proto.network import Network
from baton.proto.supervision import die_with_parent
from baton.worker.kv_pool import HostPool

GIB = 2**30
BUSY_CYCLES = 500_000
NOBODY = Peer("owner", 1, "", "")

Figures = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------ the copy


def layout_of(block_bytes: int) -> KVLayout:
    return KVLayout("bench", (Group("full", 1, 16, block_bytes, ("words",), (block_bytes // 4,), "float32"),))


def open_pool(transport: str, block_bytes: int, size: int, gpu: int) -> Any:
    """A worker's pool, on a GPU for transports that need one."""
    if transport not in ("cuda_ipc", "nccl"):
        return HostPool(layout_of(block_bytes), size // block_bytes)
    from baton.worker.cuda.memory import GpuPool, open_gpu

    return GpuPool(layout_of(block_bytes), size // block_bytes, open_gpu(gpu))


def network_of(transport: str, folder: Path) -> Network:
    """For 'far tcp' as between hosts: over TCP, with the key in `folder`."""
    if not transport.startswith("far "):
        return Network()
    return Network("127.0.0.1", load_key(str(folder / FILE_NAME)))


class Opened(NamedTuple):
    """A link to the pool of another process, and the pool of ours that it fills, on GPU 0."""

    link: Any
    pipeline: Pipeline
    pool: Pool
    tensor: torch.Tensor

    def copy(self, pull: Pull) -> None:
        waiting = [pull]
        for _ in self.pipeline.copy(lambda: waiting.pop() if waiting else None):
            pass

    def check(self, pull: Pull) -> None:
        """That the blocks of the pull, the last one into them, are what the owner has there."""
        theirs = fill(torch.empty_like(self.tensor))
        if not torch.equal(self.tensor[pull.target], theirs[pull.source]):
            raise SystemExit("blocks have arrived that are not the owner's")
        torch.cuda.empty_cache()  # memory that comes out of it would slow the next copies by 2.5 %


def fill(tensor: torch.Tensor) -> torch.Tensor:
    """The content of an owner's pool."""
    return tensor.uniform_(generator=torch.Generator(tensor.device).manual_seed(0))


class Remote(NamedTuple):
    """Another process that offers a pool, and what a reader needs."""

    owner: Peer
    pool: Any
    """Ours, of the same size, on GPU 0."""
    me: Greeting
    reading: Transport
    network: Network


@contextmanager
def owner_of(transport: str, block_bytes: int, size: int, owner_gpu: int = 0) -> Iterator[Remote]:
    """A process with a pool of `size` bytes on `owner_gpu`."""
    command = [sys.executable, __file__, "--own", transport, str(block_bytes), str(size), str(owner_gpu)]
    owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, preexec_fn=die_with_parent)
    assert owner.stdin is not None
    assert owner.stdout is not None
    address = owner.stdout.readline().decode().strip()
    pool = open_pool(transport, block_bytes, size, gpu=0)
    folder = Path(address.split()[0].removeprefix("unix:")).parent
    network = network_of(transport, folder)
    (reading,) = open_transports(transport.removeprefix("far "), pool, folder, network)
    me = Greeting(layout_of(block_bytes), "reader", 2, pool.num_blocks)
    yield Remote(Peer("owner", 1, "", address), pool, me, reading, network)
    reading.close()
    network.close()
    pool.close()
    owner.stdin.close()
    owner.wait()


@contextmanager
def opened(transport: str, block_bytes: int, size: int, owner_gpu: int = 0) -> Iterator[Opened]:
    """A link to the pool of `owner_of`."""
    with owner_of(transport, block_bytes, size, owner_gpu) as remote:
        reading = remote.reading
        with greet(remote.owner, remote.me, remote.network) as greeted:
            link = reading.open(greeted.owner.offers[reading.name], greeted.connection, greeted.memfd)
            while link.prepare():
                pass
            pipeline = Pipeline(link, block_bytes, greeted.owner.num_blocks)
            yield Opened(link, pipeline, remote.pool.blocks, remote.pool.tensor)
            link.close()


def own(transport: str, block_bytes: int, size: int, gpu: int) -> None:
    """The owner's process: offer a pool of random bytes until the input ends."""
    pool = open_pool(transport, block_bytes, size, gpu)
    fill(pool.tensor)
    with tempfile.TemporaryDirectory() as folder:
        create_key(Path(folder))
        network = network_of(transport, Path(folder))
        transports = open_transports(transport.removeprefix("far "), pool, Path(folder), network)
        greeting = Greeting(layout_of(block_bytes), "owner", 1, pool.num_blocks)
        source = PeerSource(Path(folder) / "owner.kv", greeting, transports, pool.blocks.memfd, network)
        if transport.startswith("far "):
            for path in filter(Path.is_socket, Path(folder).iterdir()):
                path.unlink()  # whoever is on another host does not see them
        print(source.address, flush=True)
        sys.stdin.read()
        source.close()
        network.close()
    pool.close()


def scattered(pool: Pool, count: int) -> Pull:
    """`count` blocks at random places, to random places."""
    source, target = (np.array(random.sample(range(pool.num_blocks), count)) for _ in range(2))
    return Pull(1, NOBODY, source, target)


def gather(_args: argparse.Namespace) -> Figures:
    """TB/s of payload: on the device alone, and as the reader's thread sees it, from the pull to its end."""
    from baton.kernels.cuda.copy import copy_blocks

    figures: Figures = {}
    for block_bytes in (2 * 2**20, 32 * 2**10):
        with opened("cuda_ipc", block_bytes, 4 * GIB) as both:
            link, pool = both.link, both.pool
            for payload in (GIB, GIB // 2, GIB // 32):
                pulls = [scattered(pool, payload // block_bytes) for _ in range(20)]
                seconds = [timed(lambda pull=pull, both=both: both.copy(pull)) for pull in pulls][4:]
                name = f"{block_bytes // 2**10} KiB blocks, {payload // 2**20} MiB"
                figures[f"{name}: pull, TB/s"] = payload / statistics.median(seconds) / 1e12
                addresses = [(link._theirs.addresses(pull.source), pool.addresses(pull.target)) for pull in pulls]
                jobs = [torch.from_numpy(np.stack(pair, axis=1)).cuda() for pair in addresses]

                def copy_five(first: int, jobs: list[torch.Tensor] = jobs, size: int = block_bytes) -> None:
                    for job in jobs[first : first + 5]:
                        copy_blocks(job, size)

                on_device = [device_seconds(lambda first=first: copy_five(first)) / 5 for first in (0, 5, 10, 15)][1:]
                figures[f"{name}: kernel, TB/s"] = payload / statistics.median(on_device) / 1e12
            both.check(pulls[-1])
    return figures


def host(_args: argparse.Namespace) -> Figures:
    """GB/s of payload between two processes on CPU, SmolLM2's blocks in float32, beside one memcpy of as much."""
    block_bytes, payload = 720 * 2**10, 90 * 2**20
    source, target = torch.rand(payload // 4), torch.empty(payload // 4)
    seconds = [timed(lambda: ctypes.memmove(target.data_ptr(), source.data_ptr(), payload)) for _ in range(20)]
    figures: Figures = {"memcpy, GB/s": payload / statistics.median(seconds) / 1e9}
    for transport in ("shm", "tcp", "far tcp", "gloo"):
        with opened(transport, block_bytes, 4 * payload) as both:
            pulls = [scattered(both.pool, payload // block_bytes) for _ in range(20)]
            seconds = [timed(lambda pull=pull, both=both: both.copy(pull)) for pull in pulls][4:]
            both.check(pulls[-1])
            figures[f"{transport}, GB/s"] = payload / statistics.median(seconds) / 1e9
    return figures


def timed(run: Any) -> float:
    """Seconds on the host's clock."""
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def device_seconds(run: Any) -> float:
    """Seconds on the device. It is kept busy at first, so that the host's time for the launch does not count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(BUSY_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


# ------------------------------------------------------------------------------------------------- decode beside copies


class Arrivals:
    """Blocks that arrive at `rate` bytes a second, `burst` bytes at a time, from a thread as in a worker."""

    def __init__(self, both: Opened, rate: float, burst: int) -> None:
        self._both, self._rate, self._burst = both, rate, burst
        self._pull = scattered(both.pool, burst // both.pool.block_bytes)
        self._stop = threading.Event()
        self._copied = 0
        self._started = time.perf_counter()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            self._both.copy(self._pull)
            self._copied += self._burst
            ahead = self._copied / self._rate - (time.perf_counter() - self._started)
            if ahead > 0:
                self._stop.wait(ahead)

    def stop(self) -> float:
        """End; the bytes a second that really came."""
        self._stop.set()
        self._thread.join()
        return self._copied / (time.perf_counter() - self._started)


def decode(args: argparse.Namespace) -> Figures:
    """Median milliseconds of a decode step at batch 32 and context 1,088, undisturbed and while blocks arrive."""
    from baton.proto.config import BatchConfig, CacheConfig, ModelConfig, WorkerConfig
    from baton.worker.engine import Engine

    model = ModelConfig(path=args.model, served_names=("m",), dtype="bfloat16", load_format="dummy", max_model_len=8192)
    cache = CacheConfig(num_blocks=8192, enable_prefix_caching=False)
    batch = BatchConfig(max_num_seqs=32, target_itl_ms=0.0)  # whole prompts, so that all 32 decode together
    engine = Engine(WorkerConfig("w", "unified", model, cache, batch, device="cuda"))
    steps(engine, 1)
    quiet = [steps(engine, n) for n in (2, 3)]
    figures: Figures = {"undisturbed, ms": statistics.median(quiet), "again, ms": quiet}
    with opened("cuda_ipc", 2 * 2**20, 4 * GIB) as both:
        for burst in (512, 64):
            arrivals = Arrivals(both, 100e9, burst * 2**20)
            figures[f"with {burst} MiB at a time, ms"] = beside = steps(engine, 10 + burst)
            figures[f"with {burst} MiB at a time, GB/s"] = arrivals.stop() / 1e9
            figures[f"with {burst} MiB at a time, ratio"] = beside / figures["undisturbed, ms"]
    engine.close()
    return figures


def steps(engine: Any, number: int) -> float:
    """Median milliseconds between the results of successive steps of 32 streams."""
    from baton.proto.messages import SamplingParams

    for index in range(32):
        prompt = [random.randrange(100, 10_000) for _ in range(1024)]
        engine.add((number, index), SamplingParams(max_tokens=128, temperature=0.0), prompt)
    times, last = [], 0.0
    while rows := engine.step():
        now = time.perf_counter()
        if len(rows) == 32:
            times.append(now - last)
        last = now
    return statistics.median(times[8:-4]) * 1e3


# ------------------------------------------------------------------------------------------------------------ handoff


SPLIT = ("--prefill", "1", "--decode", "1")


class WatchedServer:
    """`baton serve`, ready on entry; what it prints goes to stderr too."""

    def __init__(self, args: argparse.Namespace, *flags: str) -> None:
        command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "serve", args.model, *flags]
        command += ["--host", "127.0.0.1", "--port", "0", "--no-enable-prefix-caching"]
        if args.device == "cuda":
            command += ["--device", "cuda", "--gpus", args.gpus, "--load-format", "dummy", "--max-model-len", "8192"]
        command += args.serve_flags.split()
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=die_with_parent
        )
        self._lines: list[tuple[float, str]] = []
        self._printed = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(line, end="", file=sys.stderr)
            with self._printed:
                self._lines.append((time.monotonic(), line))
                self._printed.notify_all()
        with self._printed:
            self._lines.append((time.monotonic(), ""))
            self._printed.notify_all()

    def said(self, text: str, after_s: float = 0.0) -> tuple[float, str]:
        """When a line with this text came, not before `after_s`, and the line."""
        found: list[tuple[float, str]] = []

        def there() -> bool:
            found[:] = [each for each in self._lines if each[0] >= after_s and text in each[1]]
            return bool(found) or (bool(self._lines) and not self._lines[-1][1])

        with self._printed:
            self._printed.wait_for(there, timeout=300)
        if not found:
            raise SystemExit(f"the server did not say {text!r}")
        return found[0]

    @property
    def url(self) -> str:
        return self.said("ready at ")[1].split()[2]

    def pid(self, name: str) -> int:
        """Of a process, as it said when it started last."""
        with self._printed:
            lines = [line for _, line in self._lines if f" {name} is alive, pid " in line]
        return int(lines[-1].split()[-1])

    def __enter__(self) -> "WatchedServer":
        self.said("ready at ")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def handoff(args: argparse.Namespace) -> Figures:
    """Milliseconds of one handoff after the other in an idle system, p50 and p99, by stage."""
    with WatchedServer(args, *SPLIT) as server:
        return handoffs(server.url, args.input_len, args.requests)


def handoffs(url: str, input_len: int, count: int, warm_up: int = 3) -> Figures:
    """Of `count` prompts, one after the other. The gap is what the client sees between the first two tokens."""
    ledgers, receipts, gaps = [], [], []
    for _ in range(count + warm_up):
        ledger, arrivals = request(url, input_len)
        ledgers.append(ledger)
        receipts.append((arrivals[0] - ledger["stages"]["sampled"]) * 1e3)
        gaps.append((arrivals[1] - arrivals[0]) * 1e3)
    del ledgers[:warm_up], receipts[:warm_up], gaps[:warm_up]
    figures: Figures = {
        "transport": ledgers[0]["transport"],
        "moved MiB": ledgers[0].get("moved_bytes", 0) / 2**20,
        "first token sampled to client, ms": spread(receipts),
        "first to second token at the client, ms": spread(gaps),
    }
    parts = [handoff_parts(ledger["stages"]) for ledger in ledgers]
    figures["sampled to stepped, ms"] = spread([sum(each.values()) * 1e3 for each in parts])
    for stage in HANDOFF_PARTS:
        figures[f"of it up to {stage}, ms"] = spread([each[stage] * 1e3 for each in parts])
    return figures


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {"p50": statistics.median(ordered), "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]}


def request(url: str, input_len: int) -> tuple[Figures, list[float]]:
    """One streamed completion: its ledger, and when its tokens were here, on the ledger's clock."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=120)
    body = {
        "prompt": [random.randrange(100, 10_000) for _ in range(input_len)],
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    headers = {"Content-Type": "application/json", "x-baton-ledger": "1"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read().decode(errors='replace')}")
    arrivals: list[float] = []
    ledger: dict[str, Any] = {}
    for line in response:
        data = line.removeprefix(b"data:").strip()
        if line.startswith(b"data:") and data != b"[DONE]":
            now, event = time.monotonic(), json.loads(data)
            ledger = event.get("baton_ledger") or ledger
            if event["choices"]:
                arrivals.append(now)
    connection.close()
    return ledger, arrivals


# ------------------------------------------------------------------------------------------------- restart and load


def restart(args: argparse.Namespace) -> Figures:
    """Seconds from a kill -9, with another process standing by, to the worker serving again, and until a request sent
    at the kill has its answer."""
    figures: Figures = {}
    with WatchedServer(args, *SPLIT) as server:
        request(server.url, args.input_len)
        for name in ("decode-0", "prefill-0"):
            server.said(f"{name}: another process stands by")
            killed_at = time.monotonic()
            os.kill(server.pid(name), signal.SIGKILL)
            request(server.url, args.input_len)
            figures[f"{name}: until a request had its answer, s"] = time.monotonic() - killed_at
            ready_at, _ = server.said(f"{name} is ready again", killed_at)
            figures[f"{name}: until it served, s"] = ready_at - killed_at
    return figures


def load(args: argparse.Namespace) -> Figures:
    """1,024 tokens in and 128 out by Poisson arrivals: the split pool on one GPU beside one unified worker."""
    figures: Figures = {}
    kinds = {"split": SPLIT, "unified": ("--unified", "1")}
    for kind in args.kinds:
        flags = kinds[kind.removesuffix("+mps")]
        with WatchedServer(args, *flags, *(("--mps",) if kind.endswith("+mps") else ())) as server:
            bench(args, server, 32, 16)  # clocks and caches
            for rate in args.rates:
                figures[f"{kind}, {rate} req/s"] = found = bench(args, server, rate * args.seconds, rate)
                print(kind, rate, json.dumps(found), flush=True)
    return figures


def bench(args: argparse.Namespace, server: WatchedServer, count: int, rate: int) -> Figures:
    """`baton bench serve`'s figures in milliseconds."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "bench", "serve", "--disable-tqdm"]
        command += ["--base-url", server.url, "--model", args.model, "--output-json", file.name, "--temperature", "0"]
        command += ["--dataset-name", "random", "--random-input-len", "1024", "--random-output-len", "128"]
        command += ["--num-prompts", str(count), "--request-rate", str(rate), "--seed", "0", "--ignore-eos"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        found = json.loads(Path(file.name).read_text())
    names = ("mean_ttft_ms", "p99_ttft_ms", "mean_tpot_ms", "p99_tpot_ms", "mean_itl_ms", "p99_itl_ms")
    return {"completed": found["completed"], **{name: round(found[name], 2) for name in names}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="model directory, or 'demo' with --device cpu")
    parser.add_argument("--parts", nargs="+", default=["gather", "decode", "handoff"], choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="of `handoff`")
    parser.add_argument("--gpus", default="0", help="of `handoff`: 0 or 0,1")
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--input-len", type=int, default=4096)
    parser.add_argument("--serve-flags", default="", help="more flags of `baton serve`, in one string")
    parser.add_argument("--kinds", nargs="+", default=["split", "unified"], help="of `load`; also split+mps")
    parser.add_argument("--rates", nargs="+", type=int, default=[8, 16], help="of `load`: requests a second")
    parser.add_argument("--seconds", type=int, default=30, help="of arrivals at each rate")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--own", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.own:
        transport, *numbers = args.own
        own(transport, *map(int, numbers))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    result: Figures = {"device": device, "date": datetime.now(UTC).isoformat(timespec="seconds")}
    for part in args.parts:
        result[part] = PARTS[part](args)
        print(part, json.dumps(result[part], indent=2), flush=True)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2))


PARTS = {"gather": gather, "decode": decode, "handoff": handoff, "host": host, "restart": restart, "load": load}

if __name__ == "__main__":
    main()
