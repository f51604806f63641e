"""Workers that share a keeper's pool: a handoff moves zero bytes, and any of the processes may die."""

import os
import random
import signal
from pathlib import Path

import psutil
import pytest
from support.deployment import Deployment
from support.kills import kill_in_place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

LOCAL = ("--kv-transfer", "local", "--no-enable-prefix-caching", "--num-blocks", "300", "--max-model-len", "1024")
PROMPT = list(range(100, 130))


def shared_bytes(deployment: Deployment) -> dict[str, int]:
    """Of each process: bytes of memory files that it maps."""
    found = {}
    for name, pid in deployment.pids().items():
        if name in ("prefill-0", "decode-0"):
            maps = psutil.Process(pid).memory_maps(grouped=False)
            found[name] = sum(part.size for part in maps if "memfd:baton-kv" in part.path)
    return found


def standing_by(deployment: Deployment, name: str, count: int) -> int:
    """The pid of the count-th process that stood by for this worker."""
    return int(deployment.wait_for(f"{name}: another process stands by", count).split()[-1])


def test_a_handoff_moves_no_byte_and_the_pool_is_there_once() -> None:
    with Deployment("--prefill", "1", "--decode", "1", *LOCAL) as deployment:
        response = deployment.client.post(
            "/v1/completions", json={"prompt": PROMPT, "max_tokens": 4}, headers={"x-baton-ledger": "1"}
        )
        ledger = response.json()["baton_ledger"]
        mapped = shared_bytes(deployment)
        deployment.wait_for("KV blocks are swapped within the keeper's pool", 2)
        deployment.wait_idle()
    assert (ledger["transport"], ledger["moved_blocks"]) == ("local", 2)
    assert "moved_bytes" not in ledger
    assert len(set(mapped.values())) == 1
    assert len(mapped) == 2


def test_kills_lose_no_request_and_change_no_token(request: pytest.FixtureRequest) -> None:
    prompts = [[random.randrange(100, 40000) for _ in range(random.randrange(1, 200))] for _ in range(12)]
    with Deployment("--prefill", "1", "--decode", "1", *LOCAL) as deployment:
        kill_in_place(deployment, ["decode-0", "prefill-0"], prompts, request.config.getoption("--kills"))


def test_who_stands_by_takes_the_place_of_a_dead_worker(tiny_model: Path) -> None:
    flags = ("--load-format", "dummy", "--prefill", "1", "--decode", "1", *LOCAL)
    with Deployment(*flags, model=str(tiny_model)) as deployment:
        before = deployment.pids()
        for name in ("decode-0", "prefill-0"):
            standby = standing_by(deployment, name, 1)
            os.kill(before[name], signal.SIGKILL)
            deployment.wait_for(f"{name} is ready again")
            assert deployment.pids()[name] == standby
            again = standing_by(deployment, name, 2)
            assert again != standby
            os.kill(again, signal.SIGKILL)
            deployment.wait_for(f"{name}: killed by SIGKILL, while it stood by")
            os.kill(standby, signal.SIGKILL)
            deployment.wait_for(f"{name} is ready again", 2)
        assert deployment.complete(PROMPT, max_tokens=4)["usage"]["completion_tokens"] == 4


def test_workers_begin_anew_when_their_keeper_dies(tiny_model: Path) -> None:
    flags = ("--load-format", "dummy", "--prefill", "1", "--decode", "1", *LOCAL)
    with Deployment(*flags, model=str(tiny_model)) as deployment:
        before = deployment.complete(PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"]
        os.kill(deployment.pids()["keeper-0"], signal.SIGKILL)
        for name in ("keeper-0", "prefill-0", "decode-0"):
            deployment.wait_for(f"{name} is ready again")
        assert deployment.complete(PROMPT, max_tokens=4, temperature=0)["choices"][0]["text"] == before
        deployment.wait_idle()
