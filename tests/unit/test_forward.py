"""Requests that are handed on to another frontend: over a real Unix socket, to an HTTP server of the test's."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from baton.frontend.api.errors import ApiError
from baton.frontend.forward import Forward
from baton.frontend.http_io import BrokenAnswerError

Server = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def scope(**fields: Any) -> dict[str, Any]:
    headers = [(b"authorization", b"Bearer k"), (b"host", b"me"), (b"content-length", b"99"), (b"x-request-id", b"r e")]
    return {
        "type": "http",
        "method": "POST",
        "path": "/v1/responses",
        "raw_path": b"/v1/responses",
        "query_string": b"",
        "headers": headers,
        "state": {"request_id": "re"},
        **fields,
    }


class Client:
    """The client of this frontend."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.sent: list[dict[str, Any]] = []
        self.got = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.sent.append(message)
        self.got.set()

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)


def forwarded(tmp_path: Path, server: Server, body: bytes = b"", **fields: Any) -> Client:
    """A request while `server` answers the peer's socket."""

    async def run() -> Client:
        listening = await asyncio.start_unix_server(server, str(tmp_path / "peer"))
        client = Client()
        try:
            async with asyncio.timeout(10):
                await Forward(tmp_path / "peer", body)(scope(**fields), client.receive, client.send)
        finally:
            listening.close()
        return client

    return asyncio.run(run())


def answers(*pieces: bytes, seen: list[bytes] | None = None) -> Server:
    async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        if seen is not None:
            seen.extend([head, await reader.readexactly(5)])
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
        writer.close()

    return server


def test_the_request_arrives_as_it_came_and_the_answer_too(tmp_path: Path) -> None:
    seen: list[bytes] = []
    answer = b"HTTP/1.1 201 Created\r\nX-A: b\r\nX-Request-Id: r\r\nDate: x\r\nContent-Length: 4\r\n\r\nab"
    client = forwarded(tmp_path, answers(answer, b"cd", seen=seen), b"hello", query_string=b"a=1")
    head, body = seen
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /v1/responses?a=1 HTTP/1.1"
    assert b"authorization: Bearer k" in lines
    assert b"content-length: 5" in lines
    assert b"host: me" not in lines
    assert [line for line in lines if line.startswith(b"x-request-id")] == [b"x-request-id: re"]
    assert body == b"hello"
    assert client.sent[0] == {"type": "http.response.start", "status": 201, "headers": [(b"x-a", b"b")]}
    assert client.body == b"abcd"
    assert [message["more_body"] for message in client.sent[1:]][-1] is False


def test_a_streamed_answer_goes_on_piece_by_piece(tmp_path: Path) -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    client = forwarded(tmp_path, answers(head, b"2\r\nab\r\n", b"1\r\nc\r\n0\r\n\r\n"))
    assert client.sent[0]["headers"] == [(b"content-type", b"text/event-stream")]
    assert client.body == b"abc"


def test_a_client_that_leaves_ends_the_other_request(tmp_path: Path) -> None:
    async def run() -> None:
        ended = asyncio.Event()

        async def server(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
            assert await reader.read() == b""
            ended.set()
            writer.close()

        listening = await asyncio.start_unix_server(server, str(tmp_path / "peer"))
        client = Client()
        running = asyncio.create_task(Forward(tmp_path / "peer")(scope(), client.receive, client.send))
        await client.got.wait()
        client.gone.set()
        await asyncio.wait_for(ended.wait(), 10)
        await asyncio.wait_for(running, 10)
        listening.close()

    asyncio.run(run())


def test_a_frontend_that_is_not_there_or_says_nothing_is_an_error(tmp_path: Path) -> None:
    async def missing() -> None:
        client = Client()
        await Forward(tmp_path / "nobody")(scope(), client.receive, client.send)

    with pytest.raises(ApiError) as caught:
        asyncio.run(missing())
    assert (caught.value.status, "Retry-After" in caught.value.headers) == (503, True)
    with pytest.raises(ApiError) as caught:
        forwarded(tmp_path, answers())
    assert caught.value.status == 502


def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(tmp_path: Path) -> None:
    with pytest.raises(BrokenAnswerError):
        forwarded(tmp_path, answers(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nab"))
