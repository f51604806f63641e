"""After many requests, a third of them aborted, every process holds what it held before."""

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
from support.deployment import DEADLINE_S, Deployment

pytestmark = pytest.mark.slow

WARM_UP, REQUESTS, CONCURRENCY = 100, 500, 16
GROWTH_MB = 32.0
TITLES = ("scheduler", "frontend-0", "prefill-0", "decode-0")


@dataclass(frozen=True)
class Held:
    """What one process holds."""

    descriptors: int
    connections: int
    resident_mb: float


def held(deployment: Deployment) -> dict[str, Held]:
    """Of every process of the deployment."""
    out = {}
    for title, pid in deployment.pids().items():
        if title in TITLES:
            process = psutil.Process(pid)
            memory = process.memory_info().rss / 2**20
            out[title] = Held(process.num_fds(), len(process.net_connections(kind="all")), memory)
    return out


def held_at_rest(deployment: Deployment, before: dict[str, Held]) -> dict[str, Held]:
    """What is held once closed connections have been noticed, or after DEADLINE_S if they never are."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        now = held(deployment)
        done = all(now[title].descriptors <= before[title].descriptors for title in TITLES)
        if done or time.monotonic() > deadline:
            return now


async def one(client: httpx.AsyncClient, rng: random.Random) -> str:
    """A streamed request; a third of them is left, most after a random number of events, the others at a random moment,
    which may be after the end."""
    leaves = rng.random() < 1 / 3
    by_events = rng.random() < 0.8
    patience = rng.uniform(0, 0.3)
    body = {
        "prompt": [rng.randrange(100, 40000) for _ in range(rng.randrange(1, 300))],
        "max_tokens": rng.randrange(1, 80),
        "ignore_eos": True,
        "stream": True,
    }

    most = rng.randrange(body["max_tokens"]) if leaves and by_events else None

    async def read() -> str:
        events = 0
        async with client.stream("POST", "/v1/completions", json=body) as response:
            assert response.status_code == 200
            async for line in response.aiter_lines():
                if events == most:
                    return "aborted"
                assert not line.startswith('data: {"error"'), line
                events += line.startswith("data: ")
        return "done"

    try:
        return await asyncio.wait_for(read(), patience if leaves and not by_events else None)
    except TimeoutError:
        return "aborted"


async def load(url: str, count: int, seed: int) -> list[str]:
    """`count` requests, CONCURRENCY at a time."""
    rng = random.Random(seed)
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=120.0) as client:

        async def gated() -> str:
            async with gate:
                return await one(client, rng)

        return await asyncio.gather(*(gated() for _ in range(count)))


def test_nothing_leaks(tiny_model: Path) -> None:
    flags = ("--prefill", "1", "--decode", "1", "--load-format", "dummy", "--num-blocks", "400")
    with Deployment(*flags, "--max-model-len", "1024", model=str(tiny_model)) as deployment:
        asyncio.run(load(deployment.url, WARM_UP, seed=1))
        deployment.wait_idle()
        before = held(deployment)
        files = sorted(path.name for path in deployment.run_dir().iterdir())
        results = asyncio.run(load(deployment.url, REQUESTS, seed=2))
        assert results.count("aborted") > REQUESTS // 5
        assert results.count("done") > REQUESTS // 3
        deployment.wait_idle()
        after = held_at_rest(deployment, before)
        assert set(before) == set(after) == set(TITLES)
        for title in TITLES:
            grown = after[title].resident_mb - before[title].resident_mb
            print(f"{title}: {before[title]} -> {after[title]}, {grown:+.1f} MB")
            assert after[title].descriptors <= before[title].descriptors, title
            assert after[title].connections <= before[title].connections, title
            assert grown < GROWTH_MB, title
        assert sorted(path.name for path in deployment.run_dir().iterdir()) == files
        # Pools are anonymous files: no process maps a named segment that could stay behind.
        maps = [Path(f"/proc/{pid}/maps").read_text() for pid in deployment.pids().values()]
        assert not [line for text in maps for line in text.splitlines() if "/dev/shm/" in line]
