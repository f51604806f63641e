#!/usr/bin/env python
"""The served rows of the GPU table: `baton serve` and `baton bench serve` as a user starts them.

    python scripts/bench_gpu_served.py MODEL_DIR --rows B1 … B5 | D1 | C2 [--seconds 60] [--json FILE]

B1: 1,000 prompts of 100 tokens at once. B2 to B5: prompts of 1,024 tokens, Poisson arrivals. D1: 256 streams of 128
tokens in and 256 out. C2: from the command to ready, with an empty kernel cache and with the one that this has filled.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from baton.proto.supervision import die_with_parent

BATON = [sys.executable, "-P", "-m", "baton.frontend.cli.main"]
PORT = 8111
ONE_GPU = ("--unified", "1", "--device", "cuda", "--load-format", "dummy", "--max-model-len", "8192")
RATES = {"B2": 4, "B3": 8, "B4": 16, "B5": 24}


class Server:
    """`baton serve` without a prefix cache, ready on entry. `ready_s`: from the command to that."""

    def __init__(self, model: str, log: Path, cache: str | None = None, workers: Sequence[str] = ONE_GPU) -> None:
        """`cache`: where compiled kernels are kept; None: where they always are. `workers`: flags."""
        flags = [*workers, "--no-enable-prefix-caching", "--host", "127.0.0.1", "--port", str(PORT)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", **({"TRITON_CACHE_DIR": cache} if cache else {})}
        started = time.monotonic()
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [*BATON, "serve", model, "--served-model-name", "bench", *flags],
                stdout=file,
                stderr=subprocess.STDOUT,
                env=environment,
                preexec_fn=die_with_parent,
            )
        while "ready at" not in log.read_text():
            if self._process.poll() is not None:
                raise SystemExit(f"the server ended:\n{log.read_text()[-2000:]}")
            time.sleep(0.05)
        self.ready_s = time.monotonic() - started

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait()


def bench(count: int, input_len: int, output_len: int, rate: float, *more: str) -> dict[str, Any]:
    """`baton bench serve`'s figures; `more`: of its options."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        lengths = ["--random-input-len", str(input_len), "--random-output-len", str(output_len)]
        work = ["--dataset-name", "random", "--seed", "0", "--ignore-eos", "--temperature", "0", *lengths]
        load = ["--num-prompts", str(count), "--request-rate", str(rate), "--disable-tqdm"]
        target = ["--port", str(PORT), "--model", "bench", "--output-json", file.name]
        subprocess.run([*BATON, "bench", "serve", *target, *work, *load, *more], check=True, stdout=subprocess.DEVNULL)
        figures: dict[str, Any] = json.loads(Path(file.name).read_text())
    if figures["completed"] < count:
        raise SystemExit(f"only {figures['completed']} of {count} requests succeeded")
    return figures


def row(name: str, seconds: int) -> dict[str, float]:
    """A row's figures by the names of the table."""
    if name == "B1":
        found = bench(1000, 100, 128, float("inf"))
        return {
            "B1 out tok/s": found["output_throughput"],
            "B1 mean TTFT ms": found["mean_ttft_ms"],
            "B1 P99 ITL ms": found["p99_itl_ms"],
        }
    if name == "D1":
        found = bench(256, 128, 256, float("inf"))
        return {
            "D1 HTTP out tok/s": found["output_throughput"],
            "D1 HTTP mean TTFT ms": found["mean_ttft_ms"],
            "D1 HTTP mean TPOT ms": found["mean_tpot_ms"],
            "D1 HTTP P99 ITL ms": found["p99_itl_ms"],
        }
    found = bench(RATES[name] * seconds, 1024, 128, RATES[name])
    figures = {f"{name} req/s": found["request_throughput"]}
    for latency in ("ttft", "tpot"):
        figures[f"{name} mean {latency.upper()} ms"] = found[f"mean_{latency}_ms"]
        figures[f"{name} P99 {latency.upper()} ms"] = found[f"p99_{latency}_ms"]
    return {**figures, f"{name} P99 ITL ms": found["p99_itl_ms"]}


def starts(model: str, logs: Path) -> dict[str, float]:
    """Row C2. The first start reads the program from disk as well, as it does after a reboot."""
    with tempfile.TemporaryDirectory() as cache:
        seconds = {}
        for name in ("cold", "warm"):
            with Server(model, logs / f"start-{name}.log", cache) as server:
                seconds[f"C2 {name} s"] = server.ready_s
        return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", nargs="+", choices=["B1", *RATES, "D1", "C2"], required=True)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--json", type=Path, required=True, help="the server's log lies beside it")
    args = parser.parse_args()
    logs = args.json.parent
    figures = starts(args.model, logs) if "C2" in args.rows else {}
    if served := [name for name in args.rows if name != "C2"]:
        with Server(args.model, logs / "serve.log"):
            bench(32, 1024, 128, 16)  # clocks and caches
            for name in served:
                figures |= row(name, args.seconds)
                print({key: round(value, 2) for key, value in figures.items() if key.startswith(name)}, flush=True)
    args.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
