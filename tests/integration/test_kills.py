"""kill -9 of either side of a handoff at a random moment, again and again: no request lost, no token changed.

Three kills by default; `scripts/test tests/integration/test_kills.py --kills 200` for more.
"""

import concurrent.futures
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.deployment import Deployment, Served

pytestmark = pytest.mark.slow

FIELDS = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
GROWTH_MB = 96.0
"""Allocators settle: pools of 80 peers in turn add 0 (shm), 18 (gloo) and 60 MB (tcp), the last 40 of them 2."""


def told(answers: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
    """Tokens, and their logprobs, whose last bit a wrong value anywhere in a block would change."""
    choices = [answer["choices"][0] for answer in answers]
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def resident_mb(deployment: Deployment) -> dict[str, float]:
    """Of the workers that live on."""
    pids = deployment.pids()
    return {name: psutil.Process(pids[name]).memory_info().rss / 2**20 for name in ("prefill-0", "decode-0")}


def peers_mapped(deployment: Deployment) -> int:
    """Pools of other workers that decode-0 maps, its own aside."""
    maps = Path(f"/proc/{deployment.pids()['decode-0']}/maps").read_text().splitlines()
    return len({line.split()[4] for line in maps if "memfd:baton-kv" in line}) - 1


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Each kill may take so long: a victim's start, on a machine that does other things too."""
    limit = pytest.mark.timeout(300 + 60 * metafunc.config.getoption("--kills"))
    metafunc.parametrize("transport", [pytest.param(name, marks=limit) for name in ("shm", "tcp", "gloo")])


def test_kills(transport: str, request: pytest.FixtureRequest) -> None:
    kills = request.config.getoption("--kills")
    sizes = ("--num-blocks", "400", "--max-model-len", "1024", "--no-enable-prefix-caching")
    flags = (*sizes, "--kv-transfer", transport)
    rng = random.Random()
    prompts = [[rng.randrange(100, 40000) for _ in range(rng.randrange(1, 200))] for _ in range(12)]
    with Deployment("--prefill", "1", "--decode", "1", *flags) as deployment, ThreadPoolExecutor(1) as pool:
        undisturbed = told(deployment.complete_all(prompts, **FIELDS))
        before = {}
        for kill in range(kills):
            role = rng.choice(("prefill", "decode"))
            endpoint = f"ipc://{deployment.run_dir()}/scheduler"
            victim = Served("worker", "demo", "--role", role, "--name", "victim", "--scheduler", endpoint, *flags)
            try:
                victim.wait_for("victim is ready")
                beside = pool.submit(deployment.complete_all, prompts, **FIELDS)
                concurrent.futures.wait([beside], timeout=rng.uniform(0, 4))
                os.kill(victim.pids()["victim"], signal.SIGKILL)
                assert told(beside.result()) == undisturbed, f"after kill {kill} of a {role} worker"
            finally:
                victim.close()
            before = before or resident_mb(deployment)
        deployment.wait_idle()
        after = resident_mb(deployment)
        recovered = deployment.total("baton_retries_total")
        print(f"{kills} kills, {recovered:.0f} attempts repeated; MB {before} -> {after}")
        assert all(after[name] - before[name] < GROWTH_MB for name in before)
        assert peers_mapped(deployment) <= 1
