"""The edge between requests and the ASGI server: bodies in, answers out, clients that go away or stop reading."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from baton.frontend.api.errors import ApiError

log = logging.getLogger(__name__)

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before its answer; nobody receives it."""


class EventStream(Response):
    """Server-sent events, each written as it comes. A client that leaves, or reads nothing for `stalled_s`, ends it."""

    media_type = "text/event-stream"

    def __init__(self, first: bytes, rest: AsyncGenerator[bytes, None], stalled_s: float) -> None:
        """`first` has been taken from the generator already, so that early errors have a status of their own."""
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._first = first
        self._rest = rest
        self._stalled_s = stalled_s

    @classmethod
    async def begin(cls, events: AsyncGenerator[bytes, None], request: Request, stalled_s: float) -> Response:
        """Wait for the first event, so that an error before it is an answer of its own."""
        first = asyncio.ensure_future(anext(events))
        try:
            await _first_of(first, request.receive)
            if first.done():
                return cls(first.result(), events, stalled_s)
        finally:
            await _cancel(first)
        await events.aclose()
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        writer = asyncio.create_task(self._write(send))
        try:
            await _first_of(writer, receive)
            if writer.done():
                writer.result()
        finally:
            await _cancel(writer)
            await self._rest.aclose()

    async def _write(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            await self._send(send, self._first, True)
            async for data in self._rest:
                await self._send(send, data, True)
            await self._send(send, b"", False)
        except TimeoutError:
            log.warning("a client has read nothing for %.0f s: its request is aborted", self._stalled_s)

    async def _send(self, send: Send, body: bytes, more: bool) -> None:
        async with asyncio.timeout(self._stalled_s):
            await send({"type": "http.response.body", "body": body, "more_body": more})


async def answer_or_disconnect(work: Awaitable[bytes], request: Request) -> Response:
    """The JSON that `work` produces; cancels it when the client goes away meanwhile."""
    task = asyncio.ensure_future(work)
    try:
        await _first_of(task, request.receive)
        if task.done():
            return Response(task.result(), media_type="application/json")
    finally:
        await _cancel(task)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body. Raises ApiError (413) as soon as it is known to be larger than `limit` bytes."""
    declared = request.headers.get("content-length", "0")
    if declared.isdigit() and int(declared) > limit:
        raise _too_large(limit)
    body = bytearray()
    async for data in request.stream():
        body += data
        if len(body) > limit:
            raise _too_large(limit)
    return bytes(body)


def _too_large(limit: int) -> ApiError:
    # The rest of the body is still on its way: the connection can't be used again.
    return ApiError(413, f"the request is larger than {limit} bytes", headers={"Connection": "close"})


async def _first_of(task: "asyncio.Future[Any]", receive: Receive) -> None:
    """Wait until the task is done or the client is gone."""
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        watcher.cancel()


async def _cancel(task: "asyncio.Future[Any]") -> None:
    """End a task and wait for what it cleans up; a result or error that it has already is left to others."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
