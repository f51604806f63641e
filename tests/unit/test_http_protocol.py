"""What uvicorn's protocol does not bound: heads of requests that are too long, too many or too slow."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from baton.frontend.http_protocol import MAX_HEADERS, BoundedProtocol, protocol_factory
from baton.proto.config import FrontendConfig, ModelConfig

CONFIG = FrontendConfig("frontend", ModelConfig("", ("m",)), "", "", max_header_bytes=1000, head_timeout_s=0.02)
IDLE_IN_USE_S = 90.0
"""So long the most patient of common clients keeps an idle connection before it closes it itself."""


class Transport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.unread = [0]
        """Bytes that the client has not read, each time that somebody asks; the last number stays."""
        self.closed = asyncio.Event()
        self.aborted = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed.set()

    def abort(self) -> None:
        self.aborted = True
        self.close()

    def get_write_buffer_size(self) -> int:
        return self.unread.pop(0) if len(self.unread) > 1 else self.unread[0]

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def pause_reading(self) -> None:
        """Nothing is read here."""

    def resume_reading(self) -> None:
        """Nothing is read here."""


async def app(scope: dict[str, Any], _receive: Any, send: Any) -> None:
    scope["state"]["headers"].append((b"x-note", b"noted"))
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
    await send({"type": "http.response.body", "body": scope["state"]["request_id"][:2].encode()})


def connected(use: Callable[[BoundedProtocol, Transport], Awaitable[None]], config: FrontendConfig = CONFIG) -> None:
    async def run() -> None:
        served = uvicorn.Config(app, http=protocol_factory(config), ws="none", lifespan="off", log_config=None)
        served.load()
        protocol = served.http_protocol_class(config=served, server_state=ServerState(), app_state={})  # type: ignore[call-arg]
        assert isinstance(protocol, BoundedProtocol)
        transport = Transport()
        protocol.connection_made(transport)
        await use(protocol, transport)
        protocol.connection_lost(None)

    asyncio.run(run())


async def answer(protocol: BoundedProtocol, transport: Transport, request: bytes) -> tuple[int, dict[str, str], bytes]:
    protocol.data_received(request)
    while protocol.tasks:
        await asyncio.wait(protocol.tasks)
    head, _, body = transport.written.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    transport.written = b""
    return int(status.split()[1]), dict(line.split(": ", 1) for line in lines), body


def test_request_ids_and_notes_go_out_with_the_answer() -> None:
    async def use(protocol: BoundedProtocol, transport: Transport) -> None:
        for given, told in ((b"abc", "abc"), (b'a b"{\xffc', "abc"), (b"x" * 200, "x" * 128)):
            request = b"GET / HTTP/1.1\r\nX-Request-ID: " + given + b"\r\n\r\n"
            status, headers, body = await answer(protocol, transport, request)
            assert (status, headers["x-note"]) == (200, "noted")
            assert headers["x-request-id"] == headers["request-id"] == told
            assert body == told[:2].encode()
        _, headers, _ = await answer(protocol, transport, b"GET / HTTP/1.1\r\n\r\n")
        assert len(headers["x-request-id"]) == 32

    connected(use)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 1000 + b"\r\n\r\n", 431),
        (b"GET /" + b"a" * 1000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a:b\r\n" * (MAX_HEADERS + 2), 431),
    ],
)
def test_a_head_that_is_wrong_or_too_long_is_answered_and_the_connection_closed(request_: bytes, status: int) -> None:
    async def use(protocol: BoundedProtocol, transport: Transport) -> None:
        got, headers, body = await answer(protocol, transport, request_)
        assert (got, headers["connection"]) == (status, "close")
        assert set(msgspec.json.decode(body)) == {"error"}
        assert transport.is_closing()
        assert await _silent(protocol, transport)

    async def _silent(protocol: BoundedProtocol, transport: Transport) -> bool:
        protocol.data_received(b"GET / HTTP/1.1\r\n\r\n")
        return not transport.written

    connected(use)


def test_a_head_that_does_not_come_to_its_end() -> None:
    async def slow(protocol: BoundedProtocol, transport: Transport) -> None:
        protocol.data_received(b"GET / HTTP/1.1\r\nA: b\r\n")
        await transport.closed.wait()
        assert transport.written.startswith(b"HTTP/1.1 408 ")

    async def second(protocol: BoundedProtocol, transport: Transport) -> None:
        await answer(protocol, transport, b"GET / HTTP/1.1\r\n\r\n")
        await slow(protocol, transport)

    async def silent(_protocol: BoundedProtocol, transport: Transport) -> None:
        await transport.closed.wait()
        assert transport.written == b""

    for use in (slow, second, silent):
        connected(use)


def test_an_idle_connection_is_closed_in_the_end_and_later_than_clients_would() -> None:
    async def use(protocol: BoundedProtocol, transport: Transport) -> None:
        await answer(protocol, transport, b"GET / HTTP/1.1\r\n\r\n")
        assert not transport.is_closing()
        await transport.closed.wait()

    connected(use, msgspec.structs.replace(CONFIG, keep_alive_s=0.02))
    assert CONFIG.keep_alive_s > IDLE_IN_USE_S


@pytest.mark.parametrize(
    ("request_", "dribbled"),
    [(b"GET / HTTP/1.1\r\n\r\n", b"\r\n"), (b"POST / HTTP/1.1\r\nContent-Length: 1000000000\r\n\r\n", b"x")],
)
def test_bytes_that_begin_no_request_do_not_keep_an_idle_connection_open(request_: bytes, dribbled: bytes) -> None:
    async def use(protocol: BoundedProtocol, transport: Transport) -> None:
        await answer(protocol, transport, request_)
        async with asyncio.timeout(10):
            while not transport.is_closing():
                protocol.data_received(dribbled)
                await asyncio.sleep(0)

    connected(use, msgspec.structs.replace(CONFIG, keep_alive_s=0.02))


def test_a_request_on_an_idle_connection_ends_its_idleness() -> None:
    async def use(protocol: BoundedProtocol, transport: Transport) -> None:
        await answer(protocol, transport, b"GET / HTTP/1.1\r\n\r\n")
        protocol.data_received(b"\r\n")
        protocol.data_received(b"GET / HTTP/1.1\r\nA")
        await transport.closed.wait()
        assert transport.written.startswith(b"HTTP/1.1 408 ")

    connected(use, msgspec.structs.replace(CONFIG, keep_alive_s=0.01))


def test_a_client_that_reads_slowly_gets_all_of_a_long_answer() -> None:
    body = b"x" * 6 * 2**20

    async def long_answer(_scope: Any, _receive: Any, send: Any) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def run() -> None:
        config = msgspec.structs.replace(CONFIG, head_timeout_s=20, stalled_client_s=0.5)
        served = uvicorn.Config(long_answer, http=protocol_factory(config), ws="none", lifespan="off", log_config=None)
        served.load()
        state = ServerState()

        def protocol() -> Any:
            return served.http_protocol_class(config=served, server_state=state, app_state={})  # type: ignore[call-arg]

        server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname(), limit=2**14)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        await reader.readuntil(b"\r\n\r\n")
        received = 0
        while received < len(body):
            piece = await reader.read(2**14)
            assert piece, f"aborted after {received} bytes"
            received += len(piece)
            await asyncio.sleep(0.008)  # which is how slow this client is
        writer.close()
        server.close()

    asyncio.run(run())


def test_a_connection_whose_client_stops_reading_is_aborted() -> None:
    async def use(protocol: BoundedProtocol, transport: Transport) -> None:
        transport.unread = [40, 30, 30]
        protocol.pause_writing()
        await asyncio.wait_for(transport.closed.wait(), 10)
        assert transport.aborted
        assert transport.unread == [30], "less to read than the last time: the client is slow, but reads"

    connected(use, msgspec.structs.replace(CONFIG, head_timeout_s=20, stalled_client_s=0.01))


def test_a_connection_whose_client_reads_again_stays() -> None:
    async def use(protocol: BoundedProtocol, transport: Transport) -> None:
        protocol.pause_writing()
        protocol.resume_writing()
        await transport.closed.wait()
        assert not transport.aborted, "closed for want of a request"

    connected(use, msgspec.structs.replace(CONFIG, stalled_client_s=0.01))
