"""Prefill on one host and decode on another: the same tokens as in one process, no request lost, no stranger let in."""

import itertools
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.deployment import DEADLINE_S, Deployment
from support.hosts import PORT, Cable, Head, Host, ServedOn

from baton.proto.curve import create_key
from baton.proto.lifecycle import handoff_parts

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SIZES = ("--num-blocks", "400", "--max-model-len", "1024", "--no-enable-prefix-caching")
FIELDS: dict[str, Any] = {"max_tokens": 48, "temperature": 0, "ignore_eos": True, "logprobs": 1}
FIELDS["return_token_ids"] = True
PROMPTS = [[(7 * i * i + 13 * i + seed) % 40000 + 100 for i in range(20 + 90 * seed)] for seed in range(6)]
"""Of 20 to 470 tokens."""


@pytest.fixture(scope="module")
def cable() -> Iterator[Cable]:
    if missing := Cable.missing():
        pytest.skip(f"this machine can't be two hosts: {missing}")
    cable = Cable()
    yield cable
    cable.close()


@pytest.fixture(scope="module")
def key(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return create_key(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def unified() -> list[Any]:
    """What one worker answers, both legs in it."""
    with Deployment("--unified", "1", *SIZES) as deployment:
        return told(deployment.complete_all(PROMPTS, **FIELDS))


@pytest.fixture(scope="module")
def head(cable: Cable, key: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Head]:
    """`baton serve` with a prefill worker alone, on the first host."""
    near, _far = cable.hosts
    flags = ("--prefill", "1", "--decode", "0", "--listen", f"tcp://{near.address}:{PORT}", "--key-file", str(key))
    with Head(near, tmp_path_factory.mktemp("head"), *SIZES, *flags, "--admin-port", "8002") as head:
        head.wait_for(f"--scheduler tcp://{near.address}:{PORT} ")
        yield head
    print("\n".join(head.lines))


@pytest.fixture(scope="module")
def worker(head: Head, cable: Cable, key: Path) -> Iterator[ServedOn]:
    """A decode worker that has joined from the second host."""
    near, far = cable.hosts
    worker = join(far, near, key)
    try:
        head.wait_for("ready at ")
        yield worker
    finally:
        worker.close()
        print("\n".join(worker.lines))


def join(far: Host, near: Host, key: Path | None, name: str = "decode-9") -> ServedOn:
    words = ("--role", "decode", "--name", name, "--scheduler", f"tcp://{near.address}:{PORT}")
    return ServedOn(far, "worker", "demo", *SIZES, *words, *(("--key-file", str(key)) if key else ()))


def told(answers: list[dict[str, Any]]) -> list[Any]:
    choices = [answer["choices"][0] for answer in answers]
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def complete_all(head: Head) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return list(pool.map(lambda prompt: head.complete(prompt, **FIELDS), PROMPTS))


def test_the_tokens_are_those_of_one_worker_and_the_blocks_came_over_tcp(
    head: Head, worker: ServedOn, unified: list[Any]
) -> None:
    answers = complete_all(head)
    assert told(answers) == unified
    ledgers = [answer["baton_ledger"] for answer in answers]
    assert {(it["prefill_worker"], it["decode_worker"], it["transport"]) for it in ledgers} == {
        ("prefill-0", "decode-9", "tcp")
    }
    assert all(it["moved_bytes"] > 0 for it in ledgers)


def test_times_of_both_hosts_are_on_one_clock(head: Head, worker: ServedOn) -> None:
    """The second host's own is 5,000 s ahead."""
    stages = head.complete(PROMPTS[0], **FIELDS)["baton_ledger"]["stages"]
    order = ["submitted", "started", "sampled", "reported", "bound", "pull_issued", "pulled", "confirmed", "stepped"]
    moments = [stages[stage] for stage in order]
    rounding_s = 0.01  # half of a round trip between busy processes
    assert all(later - earlier > -rounding_s for earlier, later in itertools.pairwise(moments))
    assert 0 < sum(handoff_parts(stages).values()) < DEADLINE_S


def test_the_head_knows_how_the_pair_is_joined_and_why(head: Head, worker: ServedOn, cable: Cable) -> None:
    head.complete(PROMPTS[0], **FIELDS)
    links = ("ctl", "links", "--address", "127.0.0.1:8002", "--timeout", "5")

    def ask() -> str:
        asked = ServedOn(cable.hosts[0], *links)
        asked.wait()
        asked.close()
        return "\n".join(asked.lines)

    answer = wait_for(ask, "decode-9")
    assert "prefill-0  tcp        shm can't be used: prefill-0 is on another host" in answer
    metrics = wait_for(lambda: head.client.get("/metrics").text, 'baton_kv_links{role="decode",transport="tcp"')
    assert 'baton_kv_links{role="decode",transport="tcp",worker="decode-9"} 1.0' in metrics


def wait_for(ask: Callable[[], str], text: str) -> str:
    """The first answer that has the text; asking takes time by itself."""
    deadline = time.monotonic() + DEADLINE_S
    while text not in (answer := ask()):
        assert time.monotonic() < deadline, answer
    return answer


def test_a_killed_worker_on_the_other_host_loses_nothing(head: Head, worker: ServedOn, unified: list[Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(complete_all, head)
        decoding = re.compile(r'baton_requests_running{role="decode",worker="decode-9"} [1-9]')
        wait_for(lambda: " ".join(decoding.findall(head.client.get("/metrics").text)), "decode-9")
        os.kill(worker.pids()["decode-9"], signal.SIGKILL)
        assert told(beside.result()) == unified


def test_an_unplugged_cable_loses_nothing(head: Head, worker: ServedOn, cable: Cable, unified: list[Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        beside = pool.submit(complete_all, head)
        cable.pull(out=True)
        try:
            head.wait_for("decode-9: no beat for 10 s")
        finally:
            cable.pull(out=False)
        assert told(beside.result()) == unified


def test_another_key_is_refused_on_both_sides(head: Head, cable: Cable, key: Path, tmp_path: Path) -> None:
    near, far = cable.hosts
    stranger = join(far, near, create_key(tmp_path), "stranger")
    assert stranger.wait() == 2
    (line,) = [line for line in stranger.lines if line.startswith("error: ")]
    where = f"tcp://{near.address}:{PORT}"
    assert line == f"error: --scheduler {where}: it refused the key: both sides need the same --key-file"
    stranger.close()
    head.wait_for(f"a connection was refused at {where}: the other side has another key")
    said = "\n".join((*head.lines, *stranger.lines))
    secrets = [line.split('"')[1] for file in (key, tmp_path / key.name) for line in key_lines(file)]
    assert len(secrets) == 4
    assert not any(secret in said for secret in secrets)


def key_lines(file: Path) -> list[str]:
    return [line for line in file.read_text().splitlines() if "-key = " in line]


def test_without_a_key_nothing_goes_beyond_loopback(cable: Cable) -> None:
    near, far = cable.hosts
    worker = join(far, near, None)
    serve = ServedOn(near, "serve", "demo", "--port", "0", "--listen", f"tcp://{near.address}:0")
    for process in (worker, serve):
        assert process.wait() == 2
        (line,) = process.lines
        assert line.endswith("beyond loopback a key is needed: --key-file FILE, from `baton keys new DIR`")
        process.close()
