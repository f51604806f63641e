"""The edge between answers and the ASGI server: whole or as they come, clients that go away or stop reading."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from starlette.responses import Response

from baton.frontend.api.responses import encode
from baton.frontend.eager import run_eagerly

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

CLIENT_CLOSED_REQUEST = 499
"""nginx's status for a client that left before its answer; nobody receives it."""
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class BrokenAnswerError(Exception):
    """An answer failed after its first bytes were sent: only the end of the connection can tell the client."""


class Events(Protocol):
    """An answer that comes bit by bit."""

    @property
    def ended(self) -> bool:
        """The last event has been taken."""

    def take(self) -> bytes:
        """What has come since the last time; empty when nothing has. Raises ApiError, only before the first event."""

    def on_output(self, callback: Callable[[], None]) -> None:
        """Call this when something has come after everything was taken."""


class EventStream:
    """Server-sent events, each written as it comes. A client that leaves, or reads nothing for `stalled_s`, ends it.

    Events are written where they arise, without a task or a timer, as long as the connection takes them. When it does
    not, a task waits until it does, and then writes what has come meanwhile in one piece.
    """

    def __init__(self, events: Events, send: Send, stalled_s: float) -> None:
        self._events = events
        self._send = send
        self._stalled_s = stalled_s
        self._started = False
        self._over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._blocked: asyncio.Task[None] | None = None
        self._patience: asyncio.TimerHandle | None = None

    async def run(self, receive: Receive) -> None:
        """Until the last event is written or the client is gone.

        Raises what went wrong when nothing has been sent yet, and BrokenAnswerError later.
        """
        watcher = asyncio.create_task(disconnected(receive))
        watcher.add_done_callback(lambda _: self._end())
        self._events.on_output(self._flush)
        try:
            await self._over
        except Exception as error:
            if self._started:
                raise BrokenAnswerError from error
            raise
        finally:
            watcher.cancel()
            if self._blocked is not None:
                self._unblock()
                await _cancel(self._blocked)

    def _flush(self) -> None:
        if self._blocked is not None or self._over.done():
            return
        try:
            data = self._events.take()
            if data or (self._events.ended and not self._started):  # an answer without events is one, too
                self._blocked = run_eagerly(self._write(data))
        except Exception as error:
            self._end(error)
            return
        if self._blocked is not None:
            self._patience = asyncio.get_running_loop().call_later(self._stalled_s, self._give_up)
            self._blocked.add_done_callback(self._on_written)
        elif self._events.ended:
            self._end()

    async def _write(self, data: bytes) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
        await self._send({"type": "http.response.body", "body": data, "more_body": not self._events.ended})

    def _on_written(self, task: "asyncio.Task[None]") -> None:
        """The connection takes data again."""
        self._unblock()
        self._blocked = None
        if task.cancelled():
            return
        if (error := task.exception()) is not None or self._events.ended:
            self._end(error)
        else:
            self._flush()

    def _unblock(self) -> None:
        if self._patience is not None:
            self._patience.cancel()

    def _give_up(self) -> None:
        log.warning("a client has read nothing for %.0f s: its request is aborted", self._stalled_s)
        self._end()

    def _end(self, error: BaseException | None = None) -> None:
        if self._over.done():
            return
        if error is None:
            self._over.set_result(None)
        else:
            self._over.set_exception(error)


async def answer_or_disconnect(work: Awaitable[bytes], receive: Receive) -> Response:
    """The JSON that `work` produces; cancels it when the client goes away meanwhile."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return json_answer(task.result())
    finally:
        watcher.cancel()
        await _cancel(task)
    return Response(status_code=CLIENT_CLOSED_REQUEST)


def json_answer(body: object) -> Response:
    """An answer that is there already; bytes are JSON as they are."""
    return Response(body if isinstance(body, bytes) else encode(body), media_type="application/json")


def wants_ledger(scope: Scope) -> bool:
    """Whether the client asks where and when its request was served."""
    return header(scope, b"x-baton-ledger") == b"1"


def header(scope: Scope, name: bytes) -> bytes | None:
    """The first header of this lower-case name."""
    return next((value for key, value in scope["headers"] if key == name), None)


async def _cancel(task: "asyncio.Future[Any]") -> None:
    """End a task and wait for what it cleans up; a result or error that it has already is left to others."""
    if not task.done():
        task.cancel()
        await asyncio.wait({task})


async def disconnected(receive: Receive) -> None:
    """Wait until the client has gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
