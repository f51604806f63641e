"""What the frontend process costs, with a worker that has no model: scripts/instant_worker.py.

    .venv/bin/python scripts/bench_frontend.py [--model MODEL] [--streams 256] [--chat] [--output-json FILE]

Prints the tokens that one frontend process streams per second of its own CPU time, flat out and at 50 tokens per second
and stream, and what submitting 1,000 prompts at once takes. CPU time is user and system time from /proc, so cores that
are shared with the worker and the client change little. The cost of a token is the difference between two runs that
differ only in their length, divided by the tokens that one has more.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from baton.frontend.cli import engine_args
from baton.frontend.launcher import Launcher
from baton.frontend.processes import ProcessSpec, StopOrder, specs
from baton.frontend.run_dir import RunDir
from baton.proto.config import FrontendConfig, ModelConfig, SchedulerConfig, ServeConfig, WorkerConfig

HERE = Path(__file__).resolve().parent
HOST = "127.0.0.1"
TOKEN_IDS = range(1000, 10000)
PACED_TOKENS_PER_S = 50


@dataclass
class Load:
    """What the client saw, and what it cost."""

    wall_s: float
    all_begun_s: float
    """Until every stream had its first token."""
    events: int
    frontend_s: float = 0.0
    """CPU time."""
    scheduler_s: float = 0.0
    worker_s: float = 0.0
    client_s: float = 0.0


class Reader(asyncio.Protocol):
    """One streamed request on a connection of its own; counts events and looks at nothing."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._tail = b""
        self.events = 0
        self.begun_at = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        transport.write(self._request)  # type: ignore[attr-defined]

    def data_received(self, data: bytes) -> None:
        events = data.count(b"data: {")
        if events and not self.events:
            self.begun_at = time.perf_counter()
        self.events += events
        self._tail = (self._tail + data)[-64:]
        if b"data: [DONE]" in self._tail:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if b"data: [DONE]" in self._tail:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(RuntimeError(f"a stream ended early, with {self._tail!r}"))


def http_request(max_tokens: int, prompt_len: int, chat: bool, rng: random.Random) -> bytes:
    """A streamed request as bytes."""
    fields: dict[str, Any] = {"max_tokens": max_tokens, "stream": True, "ignore_eos": True, "temperature": 0}
    fields["stream_options"] = {"include_usage": True}
    if chat:
        path, fields["messages"] = "/v1/chat/completions", [{"role": "user", "content": "word " * prompt_len}]
    else:
        path, fields["prompt"] = "/v1/completions", rng.choices(TOKEN_IDS, k=prompt_len)
    body = json.dumps(fields).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def read_all(port: int, requests: list[bytes]) -> Load:
    """Send all requests at once and read the answers."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    pairs = [await loop.create_connection(partial(Reader, request), HOST, port) for request in requests]
    readers = [reader for _, reader in pairs]
    await asyncio.gather(*(reader.ended for reader in readers))
    begun = max(reader.begun_at for reader in readers) - started
    return Load(time.perf_counter() - started, begun, sum(reader.events for reader in readers))


def client(arguments: str) -> None:
    """The client's process: prints a Load as JSON."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))  # it does not interrupt what is measured
    given = json.loads(arguments)
    rng = random.Random(given["seed"])
    requests = [http_request(given["tokens"], given["prompt_len"], given["chat"], rng) for _ in range(given["streams"])]
    before = time.process_time()
    load = uvloop.run(read_all(given["port"], requests))
    load.client_s = time.process_time() - before
    print(json.dumps(asdict(load)))


class Bench:
    """Measures a running deployment."""

    def __init__(self, port: int, chat: bool, prompt_len: int) -> None:
        self._port, self._chat, self._prompt_len = port, chat, prompt_len
        self._pids = processes_of(os.getpid())
        self._seed = 0

    async def load(self, streams: int, tokens: int) -> Load:
        """Run the client once."""
        self._seed += 1
        given = {"port": self._port, "streams": streams, "tokens": tokens, "seed": self._seed}
        given |= {"chat": self._chat, "prompt_len": self._prompt_len}
        command = [sys.executable, __file__, "--client", json.dumps(given)]
        before = self._cpu_s()
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        if process.returncode:
            raise RuntimeError("the client failed")
        load = Load(**json.loads(out))
        used = {name: after - before[name] for name, after in self._cpu_s().items()}
        load.frontend_s = sum(seconds for name, seconds in used.items() if name.startswith("frontend"))
        load.scheduler_s, load.worker_s = used["scheduler"], used["unified-0"]
        return load

    async def bench_serve(self, streams: int, tokens: int) -> float:
        """CPU seconds of `baton bench serve`."""
        command = [sys.executable, "-P", "-m", "baton.frontend.cli.main", "bench", "serve", "--port", str(self._port)]
        command += ["--num-prompts", str(streams), "--random-input-len", str(self._prompt_len), "--ignore-eos"]
        command += ["--random-output-len", str(tokens), "--disable-tqdm"]
        before = os.times()
        process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.DEVNULL)
        if await process.wait():
            raise RuntimeError("baton bench serve failed")
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    def _cpu_s(self) -> dict[str, float]:
        return {name: cpu_s(pid) for name, pid in self._pids.items()}


def processes_of(parent: int) -> dict[str, int]:
    """Name -> pid of Baton's processes among the children of `parent`."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            title = (entry / "cmdline").read_text().rstrip("\0 ")
            if title.startswith("baton: ") and int(_stat(int(entry.name))[1]) == parent:
                found[title.removeprefix("baton: ")] = int(entry.name)
    return found


def cpu_s(pid: int) -> float:
    """User and system time of a process with all its threads."""
    user, system = _stat(pid)[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _stat(pid: int) -> list[str]:
    """/proc/PID/stat from the third field on: state, parent, …"""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


Figures = dict[str, float]
Part = Callable[[argparse.Namespace, Bench], Awaitable[Figures]]


async def deployed(args: argparse.Namespace, steps_per_s: float, measure: Part) -> Figures:
    """Start scheduler, worker and frontend; what is measured with them."""
    with RunDir() as run_dir:
        config = serve_config(args, run_dir)
        scheduler, _, *frontends = specs(config)
        command = (str(HERE / "instant_worker.py"), str(steps_per_s))
        worker = ProcessSpec(config.workers[0], command, StopOrder.WORKER)
        ready = asyncio.get_running_loop().create_future()
        launcher = Launcher([scheduler, worker, *frontends], run_dir.path, ready.set_result, 1.0)
        running = asyncio.create_task(launcher.run())
        await asyncio.wait({running, ready}, return_when=asyncio.FIRST_COMPLETED)
        if running.done():
            raise RuntimeError("the deployment ended before it was ready")
        try:
            return await measure(args, Bench(args.port, args.chat, args.prompt_len))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            await running


def serve_config(args: argparse.Namespace, run_dir: RunDir) -> ServeConfig:
    """One unified worker; everything else by default."""
    endpoint, private = run_dir.endpoint("scheduler"), str(run_dir.path)
    args.dtype = "float32"
    model = ModelConfig(str(engine_args.resolve_model(args)), ("bench",), max_model_len=8192)
    return ServeConfig(
        scheduler=SchedulerConfig(endpoint, private, expected_workers=1),
        frontends=tuple(
            FrontendConfig(f"frontend-{i}", model, endpoint, private, HOST, args.port, args.frontends > 1)
            for i in range(args.frontends)
        ),
        workers=(WorkerConfig("unified-0", "unified", model, scheduler=endpoint, run_dir=private),),
        run_dir=private,
    )


async def flat_out(args: argparse.Namespace, bench: Bench) -> Figures:
    """As fast as tokens come."""
    await bench.load(args.streams, 16)
    short = await bench.load(args.streams, 1)
    long = await bench.load(args.streams, args.tokens)
    return per_token(short, long, args.streams * (args.tokens - 1))


async def paced(args: argparse.Namespace, bench: Bench) -> Figures:
    """At PACED_TOKENS_PER_S."""
    await bench.load(args.streams, 16)
    short = await bench.load(args.streams, 1)
    long = await bench.load(args.streams, args.paced_tokens)
    return per_token(short, long, args.streams * (args.paced_tokens - 1))


async def submission(args: argparse.Namespace, bench: Bench) -> Figures:
    """All prompts at once, one token each."""
    await bench.load(64, 1)
    load = await bench.load(args.submissions, 1)
    return {
        "requests": args.submissions,
        "until_all_begun_s": load.all_begun_s,
        "frontend_us_per_request": 1e6 * load.frontend_s / args.submissions,
        "scheduler_us_per_request": 1e6 * load.scheduler_s / args.submissions,
        "worker_us_per_request": 1e6 * load.worker_s / args.submissions,
    }


async def bench_serve(args: argparse.Namespace, bench: Bench) -> Figures:
    """The cost of `baton bench serve` itself, at PACED_TOKENS_PER_S."""
    short, long = await bench.bench_serve(args.streams, 1), await bench.bench_serve(args.streams, args.paced_tokens)
    tokens = args.streams * (args.paced_tokens - 1)
    return {
        "tokens": tokens,
        "tokens_per_client_cpu_s": tokens / (long - short),
        "client_us_per_token": 1e6 * (long - short) / tokens,
        "client_ms_to_start_and_submit": 1e3 * short,
    }


PARTS = {
    "flat-out": (0, flat_out),
    "paced": (PACED_TOKENS_PER_S, paced),
    "submission": (0, submission),
    "bench-serve": (PACED_TOKENS_PER_S, bench_serve),
}
"""Steps per second of the worker, and what is measured with it."""


def per_token(short: Load, long: Load, tokens: int) -> Figures:
    """Figures of the tokens that the long run has more."""
    cost = long.frontend_s - short.frontend_s
    return {
        "tokens": tokens,
        "tokens_per_s": tokens / (long.wall_s - short.wall_s),
        "tokens_per_event": tokens / (long.events - short.events),
        "tokens_per_frontend_cpu_s": tokens / cost,
        "frontend_us_per_token": 1e6 * cost / tokens,
        "worker_us_per_token": 1e6 * (long.worker_s - short.worker_s) / tokens,
        "client_us_per_token": 1e6 * (long.client_s - short.client_s) / tokens,
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="directory, GGUF file, hub id or 'demo': for its tokenizer")
    parser.add_argument("--revision", default="")
    parser.add_argument("--port", type=int, default=8199)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--frontends", type=int, default=1, help="their CPU time is added up")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=512, help="of each stream, flat out")
    parser.add_argument("--paced-tokens", type=int, default=250, help="of each stream at 50 tokens per second")
    parser.add_argument("--prompt-len", type=int, default=100)
    parser.add_argument("--submissions", type=int, default=1000)
    parser.add_argument("--chat", action="store_true", help="/v1/chat/completions")
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--client", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.client:
        client(args.client)
        return
    result = {part: asyncio.run(deployed(args, *PARTS[part])) for part in args.parts}
    print(json.dumps(result, indent=2))
    if args.output_json:
        args.output_json.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
