"""The HTTP API as clients see it, over a whole deployment of a tiny model with random weights."""

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from support.deployment import DEADLINE_S, Deployment

pytestmark = pytest.mark.slow

KEY = "a-key"


@pytest.fixture(scope="module")
def served(tiny_model: Path) -> Iterator[Deployment]:
    words = ("--load-format", "dummy", "--num-blocks", "600", "--served-model-name", "tiny", "alias")
    with Deployment(*words, "--max-model-len", "2048", "--max-logprobs", "5", model=str(tiny_model)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def locked(tiny_model: Path) -> Iterator[Deployment]:
    words = ("--load-format", "dummy", "--num-blocks", "600", "--served-model-name", "tiny", "--unified", "1")
    with Deployment(*words, "--api-key", KEY, model=str(tiny_model)) as deployment:
        yield deployment


@pytest.fixture
def client(served: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


MESSAGES: list[Any] = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": "Say something."}]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": "one two three", "max_tokens": 8, "ignore_eos": True, "seed": 1, **fields}


def events(served: Deployment, path: str, fields: dict[str, Any], **headers: str) -> list[dict[str, Any]]:
    """The chunks of a streamed answer; it must end with [DONE]."""
    with served.client.stream("POST", path, json={**fields, "stream": True}, headers=headers) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        data = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def complete(served: Deployment, **fields: Any) -> dict[str, Any]:
    """The answer in one piece."""
    response = served.client.post("/v1/completions", json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


def wait_until(condition: Callable[[], bool]) -> None:
    """Ask again until it holds."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline


def error(response: httpx.Response) -> dict[str, Any]:
    envelope = response.json()
    assert set(envelope) == {"error"}
    assert set(envelope["error"]) == {"message", "type", "param", "code"}
    return envelope["error"]


def test_completion_with_the_openai_package(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="one two", max_tokens=5, seed=1, extra_body={"ignore_eos": True}
    )
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (5, 2)
    assert answer.usage.prompt_tokens_details is not None


def test_chat_with_the_openai_package_streamed_and_not(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "alias", "messages": MESSAGES, "max_tokens": 12, "seed": 3}
    whole = client.chat.completions.create(**options, extra_body={"ignore_eos": True})
    chunks = list(client.chat.completions.create(**options, stream=True, extra_body={"ignore_eos": True}))
    pieces = [chunk.choices[0].delta for chunk in chunks]
    assert pieces[0].role == "assistant"
    assert "".join(piece.content or "" for piece in pieces) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "length"
    assert whole.model == "alias"


def test_models(client: openai.OpenAI) -> None:
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny", "alias"]
    assert {model.max_model_len for model in models} == {2048}  # type: ignore[attr-defined]
    assert client.models.retrieve("alias").id == "alias"
    with pytest.raises(openai.NotFoundError, match="other"):
        client.models.retrieve("other")


def test_a_stream_says_what_the_whole_answer_says(served: Deployment) -> None:
    whole = complete(served, return_token_ids=True, logprobs=2)["choices"][0]
    chunks = events(served, "/v1/completions", body(return_token_ids=True, logprobs=2))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["text"] for choice in choices) == whole["text"]
    assert [id for choice in choices for id in choice["token_ids"]] == whole["token_ids"]
    assert len(whole["token_ids"]) == 8
    assert choices[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    for name, values in whole["logprobs"].items():
        assert [value for choice in choices for value in choice["logprobs"][name]] == values


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_tokens_without_text_have_their_events(path: str, served: Deployment) -> None:
    hidden = {"0": 100}  # the end of a text, which is not shown
    fields = body(logit_bias=hidden, max_tokens=64, stream_options={"continuous_usage_stats": True})
    if path == "/v1/chat/completions":
        fields["messages"] = MESSAGES
        del fields["prompt"]
    chunks = events(served, path, fields)
    told = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert told == sorted(told)
    assert len(set(told)) > 8  # several may have come at once
    assert told[-1] == 64
    choices = [chunk["choices"][0] for chunk in chunks]
    texts = [choice["text"] if path == "/v1/completions" else choice["delta"]["content"] for choice in choices]
    assert set(texts) == {""}


def test_usage_comes_last_or_with_every_chunk(served: Deployment) -> None:
    options = {"include_usage": True}
    *chunks, last = events(served, "/v1/completions", body(stream_options=options))
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 8
    assert {chunk["usage"] for chunk in chunks} == {None}
    options["continuous_usage_stats"] = True
    *chunks, last = events(served, "/v1/completions", body(stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 8
    assert all("usage" not in chunk for chunk in events(served, "/v1/completions", body()))
    assert served.client.post("/v1/completions", json=body(stream_options={})).status_code == 200


def test_cached_prompt_tokens_are_told(served: Deployment) -> None:
    prompt = list(range(100, 164))
    served.complete(prompt, max_tokens=1)
    usage = served.complete(prompt, max_tokens=1)["usage"]
    assert usage["prompt_tokens_details"] == {"cached_tokens": 48}


def test_several_prompts_and_samples(served: Deployment) -> None:
    answer = complete(served, prompt=["one", "two"], n=2, temperature=1.0)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert answer["usage"]["completion_tokens"] == 32
    texts = {choice["index"]: choice["text"] for choice in answer["choices"]}
    assert texts[0] != texts[1]
    streamed = dict.fromkeys(range(4), "")
    for chunk in events(served, "/v1/completions", body(prompt=["one", "two"], n=2, temperature=1.0)):
        (choice,) = chunk["choices"]
        streamed[choice["index"]] += choice["text"]
    assert streamed == texts


def test_a_seed_makes_an_answer_repeatable(served: Deployment) -> None:
    def text(**fields: Any) -> str:
        return complete(served, temperature=1.0, **fields)["choices"][0]["text"]

    assert text(seed=5) == text(seed=5)
    assert text(seed=5) != text(seed=6)


def test_a_stop_string_ends_the_text(served: Deployment) -> None:
    text = complete(served, max_tokens=32)["choices"][0]["text"]
    stop = text[len(text) // 2 :][:4]
    choice = complete(served, max_tokens=32, stop=stop)["choices"][0]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["text"] == text[: text.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
def test_the_ledger_is_told_for_the_asking(served: Deployment, stream: bool) -> None:
    if stream:
        ledger = events(served, "/v1/completions", body(), **{"x-baton-ledger": "1"})[-1]["baton_ledger"]
    else:
        headers = {"x-baton-ledger": "1"}
        ledger = served.client.post("/v1/completions", json=body(), headers=headers).json()["baton_ledger"]
    assert (ledger["prefill_worker"], ledger["decode_worker"], ledger["transport"]) == ("prefill-0", "decode-0", "shm")
    order = ["received", "submitted", "started", "scheduled", "sampled", "reported", "bound", "pull_issued", "pulled"]
    order += ["confirmed", "stepped", "finished"]
    times = [ledger["stages"][stage] for stage in order]
    assert times == sorted(times)


def test_tokenize_and_detokenize(served: Deployment) -> None:
    answer = served.client.post("/tokenize", json={"prompt": "one two", "return_token_strs": True}).json()
    assert answer == {"count": 2, "max_model_len": 2048, "tokens": answer["tokens"], "token_strs": ["one", "Ġtwo"]}
    assert served.client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": "one two"}
    chat = served.client.post("/tokenize", json={"messages": MESSAGES}).json()
    text = served.client.post("/detokenize", json={"tokens": chat["tokens"]}).json()["prompt"]
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/models", 405)],
)
def test_errors_of_http_come_in_the_same_envelope(served: Deployment, method: str, path: str, status: int) -> None:
    response = served.client.request(method, path)
    assert response.status_code == status
    error(response)


@pytest.mark.parametrize(
    ("fields", "status", "word"),
    [
        ({"model": "other"}, 404, "other"),
        ({"max_tokens": 0}, 400, "at least 1"),
        ({"max_tokens": "x"}, 400, "max_tokens"),
        ({"temperature": -1}, 400, "temperature"),
        ({"logprobs": 6}, 400, "--max-logprobs"),
        ({"max_tokens": 3000}, 400, "maximum context length"),
        ({"prompt": "word " * 5000}, 400, "maximum context length"),
        ({"prompt": None}, 400, "prompt"),
        ({"suffix": "x"}, 400, "not supported"),
        ({"stream_options": {"include_usage": True}}, 400, "stream"),
        ({"allowed_token_ids": [5], "structured_outputs": {"choice": ["a"]}}, 400, "no token to go on with"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_wrong_request_is_told_what_is_wrong(
    served: Deployment, fields: dict[str, Any], status: int, word: str, stream: bool
) -> None:
    if stream and "stream_options" in fields:
        return
    response = served.client.post("/v1/completions", json=body(**fields, stream=stream))
    assert response.status_code == status
    assert word in error(response)["message"]


def test_bodies_that_are_no_json_or_too_large(served: Deployment) -> None:
    assert served.client.post("/v1/completions", content=b"{nonsense").status_code == 400
    large = served.client.post("/v1/completions", content=b" " * (16 * 2**20 + 1))
    assert large.status_code == 413
    error(large)


def test_unknown_fields_are_ignored_with_a_line_that_names_them(served: Deployment) -> None:
    served.complete([1, 2], max_tokens=1, frobnicate=True)
    served.wait_for("frobnicate")


def test_a_client_that_leaves_frees_everything(served: Deployment) -> None:
    before = served.total("baton_requests_total", 'outcome="aborted"')
    with served.client.stream("POST", "/v1/completions", json=body(max_tokens=1500, stream=True)) as response:
        next(response.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=body(max_tokens=1500), timeout=0.5)
    served.wait_idle()
    assert served.total("baton_requests_total", 'outcome="aborted"') == before + 2


def test_a_slow_reader_holds_nobody_up_and_gets_everything(served: Deployment) -> None:
    """The cluster is done with it before it has read anything."""
    host, port = served.url.removeprefix("http://").split(":")
    content = json.dumps(body(max_tokens=1000, stream=True, return_token_ids=True)).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(content)}\r\n\r\n"
    done = served.total("baton_requests_total", 'outcome="length"') + 1
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.connect((host, int(port)))
        slow.sendall(head.encode() + content)
        wait_until(lambda: served.total("baton_requests_total", 'outcome="length"') == done)
        data = b"".join(iter(lambda: slow.recv(65536), b""))
    assert b"[DONE]" in data
    ids = [id for found in re.findall(rb'[{,]"token_ids":\[([\d,]*)\]', data) for id in found.split(b",") if id]
    assert len(ids) == 1000


def test_keys_are_asked_for_where_they_are_needed(locked: Deployment) -> None:
    for path in ("/health", "/ready"):
        assert locked.client.get(path).status_code == 200
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}):
        for path in ("/v1/models", "/metrics", "/version", "/openapi.json"):
            refused = locked.client.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
            error(refused)
    assert locked.client.get("/v1/models", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_openapi_describes_the_requests(served: Deployment) -> None:
    document = served.client.get("/openapi.json").json()
    schema = document["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    fields = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"]
    assert {"messages", "temperature", "stream", "top_logprobs"} <= set(fields)


def test_metrics_count_what_happened(served: Deployment) -> None:
    before = served.total("baton_requests_total")
    served.complete([1, 2, 3], max_tokens=2)
    assert served.total("baton_requests_total") == before + 1


def test_a_beam_search_counts_as_one_request(served: Deployment) -> None:
    def counted() -> dict[str, float]:
        names = ("length", "aborted", "stop")
        return {name: served.total("baton_requests_total", f'outcome="{name}"') for name in names}

    before, timed = counted(), served.total("baton_ttft_seconds_count")
    beams = {"use_beam_search": True, "n": 2, "ignore_eos": True}
    served.complete([1, 2, 3], max_tokens=6, **beams)
    assert counted() == before | {"length": before["length"] + 1}
    assert served.total("baton_ttft_seconds_count") == timed + 1
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{served.url}/v1/completions", json=body(max_tokens=1500, **beams), timeout=0.5)
    wait_until(lambda: counted() == before | {"length": before["length"] + 1, "aborted": before["aborted"] + 1})
    served.wait_idle()


def test_many_at_once(served: Deployment) -> None:
    barrier = threading.Barrier(16)

    def ask(seed: int) -> tuple[str, str]:
        barrier.wait()
        fields = body(seed=seed, temperature=1.0, max_tokens=20)
        chunks = events(served, "/v1/completions", fields)
        whole = complete(served, **fields)["choices"][0]["text"]
        return "".join(chunk["choices"][0]["text"] for chunk in chunks), whole

    with ThreadPoolExecutor(16) as pool:
        for streamed, whole in pool.map(ask, range(16)):
            assert streamed == whole
    served.wait_idle()


def test_what_runs_when_the_server_must_stop_ends_with_an_error_that_says_so(tiny_model: Path) -> None:
    words = ("--load-format", "dummy", "--num-blocks", "600", "--unified", "1", "--shutdown-timeout", "0.2")
    with Deployment(*words, model=str(tiny_model)) as deployment:
        endless = {"prompt": "one", "max_tokens": 4000, "ignore_eos": True, "stream": True}
        with deployment.client.stream("POST", "/v1/completions", json=endless) as response:
            lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
            next(lines)
            deployment.process.terminate()
            *_, last, done = lines
        assert "shutting down" in json.loads(last)["error"]["message"]
        assert done == "[DONE]"
        assert deployment.wait() == 0
