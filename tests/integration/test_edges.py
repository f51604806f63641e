"""Who may call the HTTP API and how, and what comes back for input that is wrong in every way."""

import os
import re
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.bad_input import BODIES
from support.deployment import DEADLINE_S, Deployment

pytestmark = pytest.mark.slow

PAGE = "https://page.example"
MAX_RESPONSE = 16 * 1024


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("keys") / "keys"
    path.touch(0o600)
    path.write_text("# team  key\nsearch  search-secret\nbatch   batch-secret\n")
    return path


@pytest.fixture(scope="module")
def locked(tiny_model: Path, key_file: Path) -> Iterator[Deployment]:
    words = ("--load-format", "dummy", "--num-blocks", "600", "--unified", "1", "--max-model-len", "2048")
    words += ("--api-key", "first-secret", "--api-key-file", str(key_file), "--allowed-origins", PAGE)
    with Deployment(*words, model=str(tiny_model)) as deployment:
        yield deployment


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def error(response: httpx.Response) -> dict[str, Any]:
    """The envelope, which is all that a bad request ever gets."""
    assert 400 <= response.status_code < 500, response.text
    assert len(response.content) + sum(len(k) + len(v) + 4 for k, v in response.headers.raw) < MAX_RESPONSE
    (name, body), *others = response.json().items()
    assert (name, others) == ("error", [])
    assert set(body) == {"message", "type", "param", "code"}
    assert response.headers["x-request-id"]
    return body


def exchange(served: Deployment, request: bytes) -> httpx.Response:
    """What comes back for bytes that a client library would not send."""
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), DEADLINE_S) as connection:
        connection.sendall(request)
        data = b"".join(iter(lambda: connection.recv(65536), b""))
    head, _, body = data.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = [tuple(line.split(": ", 1)) for line in lines]
    return httpx.Response(int(status.split()[1]), headers=headers, content=body)


# Keys


def test_every_key_opens_in_either_header_and_no_other_does(locked: Deployment) -> None:
    for key in ("first-secret", "search-secret", "batch-secret"):
        for headers in (bearer(key), {"x-api-key": key}):
            assert locked.client.get("/v1/models", headers=headers).status_code == 200
    for headers in ({}, bearer("search"), {"x-api-key": ""}, {"Authorization": "Basic first-secret"}):
        refused = locked.client.get("/v1/models", headers=headers)
        assert refused.status_code == 401
        assert error(refused)["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"


def test_without_a_key_every_route_is_closed_but_the_probes(locked: Deployment) -> None:
    document = locked.client.get("/openapi.json", headers=bearer("first-secret")).json()
    paths = {path: list(methods) for path, methods in document["paths"].items()}
    open_paths = {"/health", "/ready"}
    assert open_paths < set(paths)
    for path, methods in {**paths, "/openapi.json": ["get"], "/nothing": ["get"]}.items():
        for method in (*methods, "head", "options", "delete"):
            status = locked.client.request(method, re.sub(r"\{.*?\}", "x", path)).status_code
            assert (status == 401) == (path not in open_paths), (method, path, status)


def test_a_changed_key_file_counts_at_once_and_a_broken_one_changes_nothing(locked: Deployment, key_file: Path) -> None:
    def status(key: str) -> int:
        return locked.client.get("/v1/models", headers=bearer(key)).status_code

    def ask_until(happens: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not happens():
            assert time.monotonic() < deadline

    before = key_file.read_text()
    key_file.write_text(before + "later  later-secret\n")
    ask_until(lambda: status("later-secret") == 200)
    key_file.write_text("search\n")
    line = "line 1: expected 'NAME KEY'"
    ask_until(lambda: status("later-secret") == 200 and any(line in each for each in locked.lines))
    os.replace(_written(key_file.with_name("new"), before), key_file)
    ask_until(lambda: status("later-secret") == 401)
    assert status("search-secret") == 200


def _written(path: Path, text: str) -> Path:
    path.touch(0o600)
    path.write_text(text)
    return path


def test_tokens_are_counted_for_each_key(locked: Deployment) -> None:
    before = httpx.get(f"{locked.url}/metrics", headers=bearer("first-secret")).text
    asks = {"prompt": [1, 2, 3], "max_tokens": 2, "ignore_eos": True}
    headers = {**bearer("search-secret"), "x-baton-ledger": "1"}
    answer = locked.client.post("/v1/completions", json=asks, headers=headers).json()
    assert answer["baton_ledger"]["client"] == "search"
    wanted = {"prompt": 3.0, "output": 2.0}

    def counted(text: str) -> dict[str, float]:
        series = re.findall(r'baton_client_tokens_total{client="search",kind="(\w+)"} (\S+)', text)
        return {kind: float(value) for kind, value in series}

    assert counted(before) == {}
    deadline = time.monotonic() + DEADLINE_S
    while counted(httpx.get(f"{locked.url}/metrics", headers=bearer("first-secret")).text) != wanted:
        assert time.monotonic() < deadline


# Web pages


def test_a_page_may_ask_before_it_has_a_key(locked: Deployment) -> None:
    asks = {"Origin": PAGE, "Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type"
    preflight = locked.client.options("/v1/chat/completions", headers=asks)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == PAGE
    answer = locked.client.get("/v1/models", headers={"Origin": PAGE, **bearer("first-secret")})
    assert answer.headers["access-control-allow-origin"] == PAGE
    assert {"x-request-id", "request-id"} < set(answer.headers["access-control-expose-headers"].split(", "))
    refused = locked.client.get("/v1/models", headers={"Origin": PAGE})
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == PAGE


def test_other_pages_are_refused(locked: Deployment) -> None:
    asks = {"Origin": "https://other.example", "Access-Control-Request-Method": "POST"}
    assert "origin" in error(locked.client.options("/v1/models", headers=asks))["message"]
    asks |= {"Origin": PAGE, "Access-Control-Request-Headers": "x-" + "a" * 30_000}
    error(locked.client.options("/v1/models", headers=asks))


# Headers


def test_request_ids_come_back_as_far_as_they_are_harmless(locked: Deployment) -> None:
    for given, told in (("abc-123", "abc-123"), ('a"\\b{c}', "abc"), ("x" * 500, "x" * 128)):
        for path in ("/health", "/nothing"):
            assert locked.client.get(path, headers={"X-Request-Id": given}).headers["x-request-id"] == told
    headers = {**bearer("first-secret"), "X-Request-Id": "mine"}
    answer = locked.client.post("/v1/completions", json={"prompt": "one", "max_tokens": 1}, headers=headers)
    assert answer.json()["id"] == "cmpl-mine"
    first, second = (locked.client.get("/health").headers["x-request-id"] for _ in range(2))
    assert first != second


def test_unknown_fields_are_named_to_the_client_and_with_its_name_in_the_log(locked: Deployment) -> None:
    headers = {**bearer("batch-secret"), "x-request-id": "the-request"}
    for stream in (False, True):
        fields = {"prompt": "one", "max_tokens": 1, "frobnicate": 1, "bl\u00fc\n": 2, "stream": stream}
        answer = locked.client.post("/v1/completions", json=fields, headers=headers)
        assert answer.status_code == 200
        assert answer.headers["x-baton-ignored-fields"] == r"'frobnicate', 'bl\xfc\n'"
    line = locked.wait_for("'frobnicate'")
    assert "WARNING" in line
    assert "request the-request of batch" in line
    answer = locked.client.post("/v1/completions", json={"prompt": "one", "max_tokens": 1}, headers=headers)
    assert "x-baton-ignored-fields" not in answer.headers


def test_head_is_answered_where_get_is_plain(locked: Deployment) -> None:
    for path in ("/metrics", "/health", "/ready", "/version"):
        whole = locked.client.get(path, headers=bearer("first-secret"))
        head = locked.client.head(path, headers=bearer("first-secret"))
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers.get("content-type") == whole.headers.get("content-type")


# What is no HTTP


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /\xff HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"POST /v1/completions HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nX-Request-Id: me\r\nA: " + b"a" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n", 431),
    ],
)
def test_what_is_no_request_gets_the_envelope_and_the_end_of_its_connection(
    locked: Deployment, request_: bytes, status: int
) -> None:
    response = exchange(locked, request_)
    error(response)
    assert response.status_code == status
    if b"X-Request-Id" in request_:
        assert response.headers["x-request-id"] == "me"


# Bodies


@pytest.mark.parametrize("name", BODIES)
def test_bad_input_gets_a_short_answer_soon(locked: Deployment, name: str) -> None:
    path, body = BODIES[name]()
    headers = {**bearer("first-secret"), "content-type": "application/json"}
    began = time.monotonic()
    response = locked.client.post(path, content=body, headers=headers)
    took_s = time.monotonic() - began
    error(response)
    assert took_s < 5
    assert locked.client.get("/ready").status_code == 200


# TLS


def test_https_with_certificates_of_clients(tiny_model: Path, certificate: tuple[Path, Path]) -> None:
    cert, key = map(str, certificate)
    words = ("--load-format", "dummy", "--num-blocks", "600", "--unified", "1")
    words += ("--ssl-certfile", cert, "--ssl-keyfile", key, "--ssl-ca-certs", cert, "--ssl-cert-reqs", "2")
    with Deployment(*words, model=str(tiny_model)) as deployment:
        assert deployment.url.startswith("https://127.0.0.1:")
        context = ssl.create_default_context(cafile=cert)
        with httpx.Client(verify=context) as stranger, pytest.raises(httpx.TransportError):
            stranger.get(f"{deployment.url}/health")
        context.load_cert_chain(cert, key)
        with httpx.Client(verify=context, timeout=DEADLINE_S) as client:
            fields = {"prompt": "one", "max_tokens": 3, "stream": True, "ignore_eos": True}
            with client.stream("POST", f"{deployment.url}/v1/completions", json=fields) as answer:
                assert [line for line in answer.iter_lines() if line][-1] == "data: [DONE]"


# What can't be served is said before anything starts


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--api-key-file", "{dir}/none"), "can't read the API keys"),
        (("--api-key-file", "{dir}/open"), "chmod 600"),
        (("--api-key-file", "{dir}/short"), "line 1: expected 'NAME KEY'"),
        (("--ssl-keyfile", "{dir}/none"), "--ssl-certfile"),
        (("--ssl-certfile", "{dir}/short"), "can't be used"),
        (("--allowed-origins", "[1]"), "expected a word, or a list"),
    ],
)
def test_wrong_flags(serve: Callable[..., Any], tmp_path: Path, flags: tuple[str, str], text: str) -> None:
    _written(tmp_path / "open", "a  long-enough\n").chmod(0o644)
    _written(tmp_path / "short", "a  b\n")
    served = serve("serve", "demo", flags[0], flags[1].replace("{dir}", str(tmp_path)))
    assert served.wait() == 2
    assert text in served.wait_for("error: ")
