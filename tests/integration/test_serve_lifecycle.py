"""The life and death of a whole deployment: start, restart, join, drain, kill -9."""

import contextlib
import json
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

Serve = Callable[..., Any]
SPLIT = ("--prefill", "1", "--decode", "1")
DEADLINE_S = 60.0

pytestmark = pytest.mark.slow


def start(serve: Serve, model: Path, *flags: str) -> Any:
    words = ("--load-format", "dummy", "--num-blocks", "600", "--host", "127.0.0.1", "--port", "0")
    return serve("serve", str(model), "--served-model-name", "tiny", *words, *flags)


def body(max_tokens: int) -> dict[str, Any]:
    return {
        "model": "tiny",
        "prompt": [1, 2, 3],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "seed": 7,
        "return_token_ids": True,
    }


def token_ids(response: httpx.Response) -> Iterator[list[int]]:
    """The token ids of each chunk of a stream."""
    for line in response.iter_lines():
        if line.startswith("data: {"):
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            for choice in event["choices"]:
                yield choice["token_ids"] or []


def wait_gone(pids: list[int]) -> None:
    processes = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(processes, timeout=DEADLINE_S)
    assert [each for each in alive if each.is_running() and each.status() != psutil.STATUS_ZOMBIE] == []


def test_one_ready_line_and_every_process_has_its_name(serve: Serve, tiny_model: Path, http: httpx.Client) -> None:
    served = start(serve, tiny_model, *SPLIT)
    assert http.get(f"{served.url}/ready").status_code == 200
    assert {"scheduler", "frontend-0", "prefill-0", "decode-0"} <= set(served.pids())
    assert sum("ready at" in line for line in served.lines) == 1


def test_sigterm_lets_a_running_stream_finish(serve: Serve, tiny_model: Path, http: httpx.Client) -> None:
    served = start(serve, tiny_model, *SPLIT)
    request = {**body(3000), "stream": True}
    with http.stream("POST", f"{served.url}/v1/completions", json=request) as response:
        chunks = token_ids(response)
        tokens = next(chunks)
        pids, run_dir = list(served.pids().values()), served.run_dir()
        served.process.terminate()
        served.wait_for("requests may finish")
        assert http.get(f"{served.url}/health").status_code == 200
        assert http.get(f"{served.url}/ready").status_code == 503
        assert http.post(f"{served.url}/v1/completions", json=body(5)).status_code == 503
        tokens = tokens + [token for chunk in chunks for token in chunk]
    assert len(tokens) == 3000
    assert served.wait() == 0
    wait_gone(pids)
    assert not run_dir.exists()


def test_sigterm_lets_a_request_finish_that_has_no_stream_just_then(
    serve: Serve, tiny_model: Path, http: httpx.Client
) -> None:
    """A beam search is one stream after the other."""
    served = start(serve, tiny_model, "--unified", "1", "--shutdown-timeout", "60")
    search = {"prompt": [1, 2, 3], "max_tokens": 1000, "use_beam_search": True, "n": 2, "ignore_eos": True}
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(http.post, f"{served.url}/v1/completions", json=search, timeout=DEADLINE_S)
        while not generated(http.get(f"{served.url}/metrics").text):
            assert not answer.done()
        served.process.terminate()
        response = answer.result()
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] == 2000
    assert served.wait() == 0


def generated(metrics: str) -> float:
    """Tokens."""
    series = 'baton_tokens_total{role="unified",source="generated"'
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(series))


def test_kill_9_of_the_launcher_leaves_nothing(serve: Serve, tiny_model: Path, tmp_path: Path) -> None:
    socket = tmp_path / "http.sock"
    served = start(serve, tiny_model, *SPLIT, "--uds", str(socket))
    assert served.url == f"unix:{socket}"
    with httpx.Client(transport=httpx.HTTPTransport(uds=str(socket))) as client:
        assert client.get("http://baton/ready").status_code == 200
    pids, run_dir = list(served.pids().values()), served.run_dir()
    served.process.kill()
    wait_gone(pids)
    assert not run_dir.exists()
    assert not socket.exists()


def test_a_dead_frontend_is_started_again_on_the_same_port(serve: Serve, tiny_model: Path, http: httpx.Client) -> None:
    served = start(serve, tiny_model, *SPLIT)
    assert served.url
    os.kill(served.pids()["frontend-0"], signal.SIGKILL)
    served.wait_for("frontend-0 is ready again")
    assert http.post(f"{served.url}/v1/completions", json=body(5)).status_code == 200


def test_two_frontends_share_the_port_and_the_death_of_one(serve: Serve, tiny_model: Path) -> None:
    served = start(serve, tiny_model, "--unified", "1", "--frontends", "2")
    url = served.url
    pids = {name: pid for name, pid in served.pids().items() if name.startswith("frontend")}
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(timeout=DEADLINE_S)) for _ in range(32)]
        texts = {str(client.post(f"{url}/v1/completions", json=body(5)).json()["choices"]) for client in clients}
        assert len(texts) == 1
        assert all(psutil.Process(pid).net_connections("tcp")[1:] for pid in pids.values()), "one served everybody"
    os.kill(pids["frontend-1"], signal.SIGKILL)
    for _ in range(32):
        assert httpx.post(f"{url}/v1/completions", json=body(5), timeout=DEADLINE_S).status_code == 200
    served.wait_for("frontend-1 is ready again")


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0", "scheduler"])
def test_a_stream_survives_the_death_of_any_process_behind_it(
    serve: Serve, tiny_model: Path, http: httpx.Client, victim: str
) -> None:
    served = start(serve, tiny_model, *SPLIT)
    undisturbed = http.post(f"{served.url}/v1/completions", json=body(300)).json()["choices"][0]["token_ids"]
    with http.stream("POST", f"{served.url}/v1/completions", json={**body(300), "stream": True}) as response:
        chunks = token_ids(response)
        tokens = next(chunks)
        os.kill(served.pids()[victim], signal.SIGKILL)
        tokens = tokens + [token for chunk in chunks for token in chunk]
    assert tokens == undisturbed
    served.wait_for(f"{victim} is ready again")
    assert http.post(f"{served.url}/v1/completions", json=body(5)).status_code == 200


def test_a_worker_started_by_hand_joins_and_leaves(serve: Serve, tiny_model: Path, http: httpx.Client) -> None:
    served = start(serve, tiny_model, *SPLIT)
    assert served.url
    words = ("--load-format", "dummy", "--num-blocks", "600", "--name", "decode-extra", "--role", "decode")
    worker = serve("worker", str(tiny_model), *words, "--scheduler", f"ipc://{served.run_dir()}/scheduler")
    worker.wait_for("decode-extra is ready")
    assert 'worker="decode-extra"' in http.get(f"{served.url}/metrics").text
    worker.process.terminate()
    assert worker.wait() == 0
    assert http.post(f"{served.url}/v1/completions", json=body(5)).status_code == 200


def test_a_worker_with_another_model_or_a_name_that_is_taken_does_not_join(
    serve: Serve, tiny_model: Path, http: httpx.Client
) -> None:
    served = start(serve, tiny_model, *SPLIT)
    before = http.post(f"{served.url}/v1/completions", json=body(5)).json()["choices"]
    words = ("--load-format", "dummy", "--num-blocks", "600", "--scheduler", f"ipc://{served.run_dir()}/scheduler")
    other = serve("worker", str(tiny_model), *words, "--name", "unified-9", "--role", "unified", "--seed", "5")
    assert other.wait() == 2
    assert "unified-9 has another model than" in other.lines[-1]
    twin = serve("worker", str(tiny_model), *words, "--name", "decode-0", "--role", "decode")
    twin.wait_for("there is a worker decode-0 already")
    assert not [line for line in served.lines if "fenced" in line]
    assert http.post(f"{served.url}/v1/completions", json=body(5)).json()["choices"] == before
    os.kill(served.pids()["decode-0"], signal.SIGKILL)
    twin.wait_for("decode-0 is ready")
    assert http.post(f"{served.url}/v1/completions", json=body(5)).json()["choices"] == before


def test_workers_that_joined_over_tcp_and_share_a_host_hand_over_through_shared_memory(
    serve: Serve, tiny_model: Path, http: httpx.Client
) -> None:
    served = start(serve, tiny_model, "--prefill", "0", "--decode", "0", "--listen", "tcp://127.0.0.1:0")
    scheduler = served.wait_for("--scheduler tcp://").partition("--scheduler ")[2].split()[0]
    words = ("--load-format", "dummy", "--num-blocks", "600", "--scheduler", scheduler)
    for role in ("prefill", "decode"):
        serve("worker", str(tiny_model), *words, "--name", f"{role}-7", "--role", role)
    headers = {"x-baton-ledger": "1"}
    ledger = http.post(f"{served.url}/v1/completions", json=body(5), headers=headers).json()["baton_ledger"]
    workers = ledger["prefill_worker"], ledger["decode_worker"]
    assert (*workers, ledger["transport"]) == ("prefill-7", "decode-7", "shm")


def test_a_worker_that_cannot_load_ends_the_start_with_its_reason(
    serve: Serve, tiny_model: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in tiny_model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "architectures": ["UnheardOfModel"]}))
    served = start(serve, broken, *SPLIT)
    assert served.wait() == 2
    assert served.lines[-1].startswith("error: ")
    assert "UnheardOfModel" in served.lines[-1]
    assert not [line for line in served.lines if "Traceback" in line]
