"""Bodies of requests: read within bounds, and parsed so that running streams do not notice.

Parsing JSON holds the interpreter's lock, in whatever thread it runs, and so holds every stream up: a millisecond for a
hundred kilobytes, most of a second for 16 MiB of empty lists. What it costs is bounded by two rules for all but short
bodies: one with more than MAX_VALUES values is refused unparsed, and they are parsed one after the other, with pauses,
so that together they take at most LOOP_SHARE of the time.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
from starlette.requests import ClientDisconnect

from baton.frontend.api.errors import ApiError, bad_request, unavailable
from baton.frontend.http_io import Receive, Scope, header
from baton.proto.config import FrontendConfig

SHORT_BYTES = 64 * 2**10
"""Parsed within half a millisecond."""
MAX_VALUES = 2**19
"""Commas and opening brackets, also those in strings: two million tokens of prose, half a million token ids."""
LOOP_SHARE = 0.2


class Bodies:
    """The bodies of all requests of one server."""

    def __init__(self, config: FrontendConfig) -> None:
        self._limit = config.max_request_bytes
        self._max_pending = config.max_pending_bytes
        self._timeout_s = config.body_timeout_s
        self._pending = 0
        self._parsing = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def of(self, scope: Scope, receive: Receive) -> AsyncIterator[bytes]:
        """The body of one request; leave the block when it is parsed.

        Raises ApiError: 400 for too many values, 408 when it does not come, 413 when it is too large, 503 when too much
        is on its way already.
        """
        body = bytearray()
        try:
            await self._read(scope, receive, body)
            if len(body) <= SHORT_BYTES:
                yield bytes(body)
                return
            await asyncio.to_thread(check_values, body)
            async with self._paced():
                yield bytes(body)
        finally:
            self._pending -= len(body)

    async def _read(self, scope: Scope, receive: Receive, body: bytearray) -> None:
        declared = header(scope, b"content-length") or b"0"
        if declared.isdigit() and int(declared) > self._limit:
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientDisconnect
                    more = message.get("more_body", False)
                    self._add(body, message.get("body", b""))
        except TimeoutError:
            text = f"the body did not arrive within {self._timeout_s:.0f} s"
            raise ApiError(408, text, headers=_CLOSE) from None

    def _add(self, body: bytearray, piece: bytes) -> None:
        body += piece
        self._pending += len(piece)
        if len(body) > self._limit:
            raise self._too_large()
        if self._pending > self._max_pending:
            error = unavailable("too many large requests are on their way; try again")
            error.headers |= _CLOSE
            raise error

    @contextlib.asynccontextmanager
    async def _paced(self) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        await self._parsing.acquire()
        began = loop.time()
        try:
            yield
        finally:
            loop.call_later((loop.time() - began) * (1 / LOOP_SHARE - 1), self._parsing.release)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request is larger than {self._limit} bytes", headers=_CLOSE)


_CLOSE = {"Connection": "close"}
"""The rest of the body is still on its way: the connection can't be used again."""


def check_values(body: bytes | bytearray) -> None:
    """Raises ApiError (400) for JSON with more than MAX_VALUES values.

    Takes a fraction of the time to parse it, nearly all of it without the interpreter's lock.
    """
    data = np.frombuffer(body, np.uint8)
    count = np.count_nonzero((data == ord(",")) | (data == ord("[")) | (data == ord("{")))
    if count > MAX_VALUES:
        raise bad_request(f"the body has more than {MAX_VALUES} values; send them in several requests")
