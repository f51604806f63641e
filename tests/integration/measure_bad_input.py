"""What bad input does to another client's stream: inter-token latency beside floods of it, and without.

    .venv/bin/python tests/integration/measure_bad_input.py [--runs 5] [--tokens 100] [--only GROUP …] [--model MODEL]

Serves MODEL with one compute thread, so that a core is left for the frontend. For each group of bad requests a stream
is read undisturbed and disturbed in turns; the figures are the medians over the runs of each run's mean inter-token
latency. CLIENTS connections send bad requests without a pause, from a process that takes only idle time: a real client
has a machine of its own.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.bad_input import BODIES
from support.deployment import Deployment

CLIENTS = 4
SLOW_SENDERS = 200
SLOW_INTERVAL_S = 0.05
GROUPS: dict[str, tuple[str, ...]] = {
    "small and many": (
        "no JSON at all",
        "an infinite number",
        "wrong types",
        "a wrong id",
        "enormous n",
        "invalid UTF-8",
    ),
    "large JSON": ("10 MiB of empty lists", "10 MiB of ids", "no JSON", "deep nesting", "a huge name"),
    "just below the bound": ("as many values as may be",),
    "too large": ("too much",),
    "long text": ("10 MiB of text", "long messages", "many messages"),
    "fan-out": ("many prompts", "many lists of ids", "prompts times n"),
    "long lists": (
        "a long stop list",
        "a long stop string",
        "many stop ids",
        "many biases",
        "many unknown fields and a wrong one",
    ),
    "grammars": (
        "a long regex",
        "a deep regex",
        "a long choice",
        "a large schema",
        "a deep schema",
        "a deep tool",
        "many tools",
    ),
    "slow senders": (),
}


@dataclass
class Figures:
    """Of one run."""

    mean_ms: float
    p99_ms: float
    answers: int = 0
    """To bad requests."""
    largest: int = 0
    """Bytes of an answer."""


def post(path: str, body: bytes, *headers: str) -> bytes:
    """One request."""
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, *headers, "", ""]).encode() + body


async def read_stream(host: str, port: int, tokens: int) -> Figures:
    """Inter-token latency of one stream."""
    fields = {"prompt": "Once upon a time", "max_tokens": tokens, "stream": True, "ignore_eos": True, "seed": 1}
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(post("/v1/completions", json.dumps(fields | {"return_token_ids": True}).encode(), "Connection: close"))
    times: list[float] = []
    while line := await reader.readline():
        if line.startswith(b"data: {"):
            times.append(time.perf_counter())
    writer.close()
    gaps = [after - before for before, after in itertools.pairwise(times)]
    assert len(times) > tokens // 2, f"only {len(times)} events for {tokens} tokens"
    return Figures(1e3 * (times[-1] - times[0]) / (tokens - 1), 1e3 * statistics.quantiles(gaps, n=100)[98])


async def flood(host: str, port: int, names: list[str]) -> None:
    """Send bad requests until standard input ends; print how many answers came and the size of the largest."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_reader(0, stop.set)
    sizes: list[int] = []
    requests = [post(*BODIES[name](), "Connection: close") for name in names]
    if requests:
        work = [_send(host, port, itertools.cycle(requests[i:] + requests[:i]), sizes) for i in range(CLIENTS)]
    else:
        work = [_send_slowly(host, port) for _ in range(SLOW_SENDERS)]
    tasks = [asyncio.create_task(each) for each in work]
    await stop.wait()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(len(sizes), max(sizes, default=0))


async def _send(host: str, port: int, requests: "itertools.cycle[bytes]", sizes: list[int]) -> None:
    for request in requests:
        reader, writer = await asyncio.open_connection(host, port)
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            writer.write(request)
            await writer.drain()
        with contextlib.suppress(ConnectionError):
            data = await reader.read()
            assert data.startswith(b"HTTP/1.1 4"), data[:100]
            sizes.append(len(data))
        writer.close()


async def _send_slowly(host: str, port: int) -> None:
    while True:
        reader, writer = await asyncio.open_connection(host, port)
        writer.write(post("/v1/completions", b"").replace(b"Length: 0", b"Length: 9999999"))
        while not reader.at_eof():
            await asyncio.sleep(SLOW_INTERVAL_S)
            writer.write(b" ")
        writer.close()


@contextlib.asynccontextmanager
async def disturbed(host: str, port: int, names: tuple[str, ...], figures: list[int]) -> AsyncIterator[None]:
    """A flood in a process of its own."""
    command = [sys.executable, __file__, "--flood", json.dumps([host, port, names])]
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        await asyncio.sleep(1.0)  # it has begun
        yield
    finally:
        out, _ = await process.communicate(b"")  # the end of its input
        figures += map(int, out.split())


async def measure(args: argparse.Namespace, host: str, port: int) -> bool:
    """Print a line for each group; whether all are within a fifth of the undisturbed value."""
    fine = True
    await read_stream(host, port, args.tokens)
    print(f"{'':22}{'ITL alone':>10}{'beside':>10}{'ratio':>7}{'p99 alone':>11}{'beside':>9}{'bad/s':>8}{'largest':>9}")
    for group in args.only or GROUPS:
        alone, beside = [], []
        for _ in range(args.runs):
            alone.append(await read_stream(host, port, args.tokens))
            counts: list[int] = []
            began = time.perf_counter()
            async with disturbed(host, port, GROUPS[group], counts):
                beside.append(await read_stream(host, port, args.tokens))
            beside[-1].answers, beside[-1].largest = round(counts[0] / (time.perf_counter() - began)), counts[1]
        one, two = (statistics.median(run.mean_ms for run in runs) for runs in (alone, beside))
        p99s = [statistics.median(run.p99_ms for run in runs) for runs in (alone, beside)]
        rate, largest = statistics.median(run.answers for run in beside), max(run.largest for run in beside)
        fine = fine and two <= 1.2 * one and largest <= 16 * 1024
        row = f"{group:22}{one:7.1f} ms{two:7.1f} ms{two / one:7.2f}{p99s[0]:8.1f} ms{p99s[1]:6.1f} ms"
        print(f"{row}{rate:8.0f}{largest:7} B", flush=True)
    return fine


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--only", nargs="+", choices=GROUPS)
    parser.add_argument("--flood", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.flood:
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
        host, port, names = json.loads(args.flood)
        asyncio.run(flood(host, port, names))
        return 0
    with Deployment("--unified", "1", "--threads", "1", model=args.model) as deployment:
        host, port = deployment.url.removeprefix("http://").split(":")
        return 0 if asyncio.run(measure(args, host, int(port))) else 1


if __name__ == "__main__":
    sys.exit(main())
