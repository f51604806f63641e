"""HTTP/1.1 as a benchmark needs it: connections that are kept, and answers told piece by piece with their arrival time.

A general client spends more time on each piece than a server needs to make it, and then measures itself.
"""

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import cast
from urllib.parse import urlsplit

import httptools

MAX_ERROR_BYTES = 64 * 1024
"""Of the body of an answer that is kept for the message."""

OnBody = Callable[[bytes, float], None]


class HttpError(Exception):
    """No complete answer, or one that is not 200."""


class Connections:
    """Connections to one server, used again when they are free; close() ends them all."""

    def __init__(self, base_url: str, headers: dict[str, str]) -> None:
        """Raises ValueError for what is no http or https URL."""
        url = urlsplit(base_url)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(f"{base_url} is not an http or https URL")
        self._host = url.hostname
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context() if url.scheme == "https" else None
        self._prefix = url.path.rstrip("/")
        head = {"Host": url.netloc.rpartition("@")[2], "Accept": "*/*", "Content-Type": "application/json", **headers}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        self._idle: list[_Connection] = []
        self._all: set[_Connection] = set()

    async def request(self, method: str, path: str, body: bytes, on_body: OnBody) -> None:
        """Send a request; `on_body(bytes, time.perf_counter() of their arrival)` hears what a 200 brings.

        Raises HttpError and OSError.
        """
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(body)}\r\n\r\n"
        data = head.encode() + body
        while self._idle:
            connection = self._idle.pop()
            if connection.open and await self._exchange(connection, data, on_body):
                return
        connection = await self._connect()
        if not await self._exchange(connection, data, on_body):
            raise HttpError("the server closed the connection without an answer")

    async def close(self) -> None:
        """End every connection."""
        for connection in self._all:
            connection.close()
        await asyncio.gather(*(connection.closed for connection in self._all))

    async def _connect(self) -> "_Connection":
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        self._all.add(connection)
        return connection

    async def _exchange(self, connection: "_Connection", data: bytes, on_body: OnBody) -> bool:
        """False when the server had closed the connection before it saw the request."""
        try:
            answered = await connection.exchange(data, on_body)
        except BaseException:
            connection.close()
            self._all.discard(connection)
            raise
        if connection.open:
            self._idle.append(connection)
        else:
            self._all.discard(connection)
        return answered


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self.open = False
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None
        self._on_body: OnBody = lambda _data, _now: None
        self._done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._begin()

    async def exchange(self, data: bytes, on_body: OnBody) -> bool:
        """Send a request and wait for the end of its answer; False when not a byte of it came."""
        assert self._transport is not None
        self._begin()
        self._on_body = on_body
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(data)
        return await self._done

    def close(self) -> None:
        """At once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance
        self.open = True

    def data_received(self, data: bytes) -> None:
        self._now = time.perf_counter()
        self._begun = True
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserCallbackError as error:
            self._end(error.__context__ or error)
            self.close()
        except httptools.HttpParserError as error:
            self._end(HttpError(f"the answer is no HTTP: {error}"))
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self.closed.set_result(None)
        if not self._begun:
            self._end(False)
        elif self._status and not self._framed:
            self._complete()  # the end of the connection is the end of the body
        else:
            self._end(exc or HttpError("the connection ended in the middle of the answer"))

    # What the parser calls.

    def on_header(self, name: bytes, _value: bytes) -> None:
        self._framed |= name.lower() in (b"content-length", b"transfer-encoding")

    def on_headers_complete(self) -> None:
        self._status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._status == 200:
            self._on_body(body, self._now)
        elif len(self._refusal) < MAX_ERROR_BYTES:
            self._refusal += body

    def on_message_complete(self) -> None:
        if not self._parser.should_keep_alive():
            self.open = False
            self.close()
        self._complete()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._begun = self._framed = False
        self._status = 0
        self._refusal = b""
        self._now = 0.0

    def _complete(self) -> None:
        refused = HttpError(f"HTTP {self._status}: {self._refusal.decode(errors='replace')[:200]}")
        self._end(True if self._status == 200 else refused)

    def _end(self, result: bool | BaseException) -> None:
        if self._done.done():
            return
        if isinstance(result, bool):
            self._done.set_result(result)
        else:
            self._done.set_exception(result)
