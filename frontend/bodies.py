"""Bodies of requests: read within bounds, and parsed so that running streams do not notice.

Reading megabytes takes the machine's time. Parsing JSON holds the interpreter's lock too, in whatever thread it runs,
and so holds every stream up: a millisecond for a hundred kilobytes, most of a second for 16 MiB of empty lists. What
all but short bodies cost is bounded by three rules: together they are read at BYTES_PER_S, one with more than
MAX_VALUES values is refused unparsed, and they are parsed one after the other, with pauses, so that they take at most
LOOP_SHARE of the time.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import numpy as np
from starlette.requests import ClientDisconnect

from baton.frontend.api.errors import ApiError, bad_request, unavailable
from baton.frontend.http_io import Receive, Scope, header
from baton.frontend.rates import Rate
from baton.proto.config import FrontendConfig

SHORT_BYTES = 64 * 2**10
"""Parsed within half a millisecond."""
MAX_VALUES = 2**19
"""Commas and opening brackets, also those in strings: two million tokens of prose, half a million token ids."""
LOOP_SHARE = 0.2
BYTES_PER_S = 64 * 2**20
"""Of all that goes beyond SHORT_BYTES of a body."""
MAX_WAIT_S = 1.0
"""For the next piece of a body."""
DISCARD_S = 5.0
"""A body that is too large is still read for so long: most clients look for the answer only when all is sent."""
DISCARD_BODIES = 4
"""How much of it, in largest bodies."""


class Bodies:
    """The bodies of all requests of one server."""

    def __init__(self, config: FrontendConfig) -> None:
        self._limit = config.max_request_bytes
        self._max_pending = config.max_pending_bytes
        self._timeout_s = config.body_timeout_s
        self._pending = 0
        self._parsing = asyncio.Lock()
        self._rate = Rate(BYTES_PER_S, BYTES_PER_S / 16, MAX_WAIT_S)

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
            if header(scope, b"expect") is None and int(declared) <= DISCARD_BODIES * self._limit:
                await self._discard(receive)
            raise self._too_large()
        try:
            async with asyncio.timeout(self._timeout_s):
                async for piece in self._pieces(receive):
                    await self._add(body, piece, receive)
        except TimeoutError:
            text = f"the body did not arrive within {self._timeout_s:.0f} s"
            raise ApiError(408, text, headers=_CLOSE) from None

    async def _pieces(self, receive: Receive) -> AsyncIterator[bytes]:
        num_bytes, more = 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            piece, more = message.get("body", b""), message.get("more_body", False)
            num_bytes += len(piece)
            if num_bytes > SHORT_BYTES:
                await self._rate.take(len(piece))
            yield piece

    async def _add(self, body: bytearray, piece: bytes, receive: Receive) -> None:
        body += piece
        self._pending += len(piece)
        if len(body) > self._limit:
            await self._discard(receive)
            raise self._too_large()
        if self._pending > self._max_pending:
            error = unavailable("too many large requests are on their way; try again")
            error.headers |= _CLOSE
            raise error

    async def _discard(self, receive: Receive) -> None:
        num_bytes = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_S):
                async for piece in self._pieces(receive):
                    num_bytes += len(piece)
                    if num_bytes > DISCARD_BODIES * self._limit:
                        return

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
"""The rest of the body may still be on its way: the connection can't be used again."""


def check_values(body: bytes | bytearray) -> None:
    """Raises ApiError (400) for JSON with more than MAX_VALUES values.

    Takes a fraction of the time to parse it, nearly all of it without the interpreter's lock.
    """
    data = np.frombuffer(body, np.uint8)
    count = np.count_nonzero((data == ord(",")) | (data == ord("[")) | (data == ord("{")))
    if count > MAX_VALUES:
        raise bad_request(f"the body has more than {MAX_VALUES} values; send them in several requests")
