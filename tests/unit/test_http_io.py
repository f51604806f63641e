"""Writing an answer as it comes: clients that read, that read slowly, that stop reading, that leave."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.eager import run_eagerly
from baton.frontend.http_io import BrokenAnswerError, EventStream


class Source:
    """Events of an answer, put there by the test."""

    def __init__(self) -> None:
        self.ended = False
        self._data = b""
        self._error: Exception | None = None
        self._come: Callable[[], None] = lambda: None

    def on_output(self, callback: Callable[[], None]) -> None:
        self._come = callback

    def put(self, data: bytes, *, last: bool = False) -> None:
        was_empty = not self._data
        self._data += data
        self._last = last
        if was_empty:
            self._come()

    def fail(self, error: Exception) -> None:
        self._error = error
        self._come()

    def take(self) -> bytes:
        if self._error is not None:
            raise self._error
        data, self._data = self._data, b""
        self.ended = self.ended or (bool(data) and self._last)
        return data


class Connection:
    """What an ASGI server is to an application; while `room` is cleared, a send waits."""

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.room.set()
        self.left = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def send(self, message: dict[str, Any]) -> None:
        if not self.room.is_set():
            await self.room.wait()
        self.sent.append(message)

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    @property
    def pieces(self) -> list[bytes]:
        return [message["body"] for message in self.sent if message["type"] == "http.response.body"]


def streamed(use: Callable[[Source, Connection, "asyncio.Task[None]"], Awaitable[None]], stalled_s: float = 60) -> None:
    """Run `use` beside a stream that has just begun."""

    async def run() -> None:
        source, connection = Source(), Connection()
        running = asyncio.create_task(EventStream(source, connection.send, stalled_s).run(connection.receive))
        await asyncio.sleep(0)
        await use(source, connection, running)
        assert running.done()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_events_are_written_as_they_come_by_whoever_brings_them() -> None:
    async def use(source: Source, connection: Connection, running: "asyncio.Task[None]") -> None:
        tasks = asyncio.all_tasks()
        for piece in (b"a", b"b"):
            source.put(piece)
            assert connection.pieces[-1] == piece
        assert asyncio.all_tasks() == tasks
        source.put(b"c", last=True)
        await running
        assert connection.sent[0]["status"] == 200
        assert [message["more_body"] for message in connection.sent[1:]] == [True, True, False]

    streamed(use)


def test_an_answer_that_ends_without_an_event_is_an_empty_one() -> None:
    async def use(source: Source, connection: Connection, running: "asyncio.Task[None]") -> None:
        source.ended = True
        source.put(b"")
        await running
        assert [message["type"] for message in connection.sent] == ["http.response.start", "http.response.body"]
        assert (connection.sent[0]["status"], connection.pieces) == (200, [b""])
        assert not connection.sent[1]["more_body"]

    streamed(use)


def test_what_comes_while_the_client_does_not_read_is_written_in_one_piece() -> None:
    async def use(source: Source, connection: Connection, running: "asyncio.Task[None]") -> None:
        source.put(b"a")
        connection.room.clear()
        for piece in (b"b", b"c", b"d"):
            source.put(piece)
        assert connection.pieces == [b"a"]
        connection.room.set()
        while len(connection.pieces) < 3:
            await asyncio.sleep(0)
        source.put(b"e", last=True)
        await running
        assert connection.pieces == [b"a", b"b", b"cd", b"e"]

    streamed(use)


def test_the_last_events_may_have_to_wait_too() -> None:
    async def use(source: Source, connection: Connection, running: "asyncio.Task[None]") -> None:
        connection.room.clear()
        source.put(b"a", last=True)
        await asyncio.sleep(0)
        assert not running.done()
        connection.room.set()
        await running
        assert connection.pieces == [b"a"]

    streamed(use)


def test_a_client_that_reads_nothing_is_given_up() -> None:
    async def use(source: Source, connection: Connection, running: "asyncio.Task[None]") -> None:
        connection.room.clear()
        source.put(b"a")
        await running
        assert connection.sent == []

    streamed(use, stalled_s=0.01)


def test_a_client_that_leaves_ends_the_stream_also_while_a_write_waits() -> None:
    async def use(source: Source, connection: Connection, running: "asyncio.Task[None]") -> None:
        source.put(b"a")
        connection.room.clear()
        source.put(b"b")
        connection.left.set()
        await running
        source.put(b"c")
        assert connection.pieces == [b"a"]

    streamed(use)


def test_an_error_before_the_first_event_is_the_answer_and_a_later_one_breaks_it() -> None:
    async def early(source: Source, connection: Connection, running: "asyncio.Task[None]") -> None:
        source.fail(bad_request("no"))
        with pytest.raises(ApiError, match="no"):
            await running
        assert connection.sent == []

    async def late(source: Source, _connection: Connection, running: "asyncio.Task[None]") -> None:
        source.put(b"a")
        source.fail(RuntimeError("a bug"))
        with pytest.raises(BrokenAnswerError):
            await running

    streamed(early)
    streamed(late)


def test_a_coroutine_that_waits_goes_on_in_a_task_and_hears_of_its_cancellation() -> None:
    heard: list[str] = []

    async def waits(event: asyncio.Event) -> None:
        heard.append("began")
        try:
            await event.wait()
            await asyncio.sleep(0)
            heard.append("went on")
        except asyncio.CancelledError:
            heard.append("cancelled")
            raise

    async def run() -> None:
        event = asyncio.Event()
        task = run_eagerly(waits(event))
        assert task is not None
        assert heard == ["began"]
        event.set()
        await task
        task = run_eagerly(waits(asyncio.Event()))
        assert task is not None
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        event.set()
        assert run_eagerly(_ends()) is None
        with pytest.raises(ZeroDivisionError):
            run_eagerly(_fails())

    asyncio.run(run())
    assert heard == ["began", "went on", "began", "cancelled"]


async def _ends() -> None:
    pass


async def _fails() -> None:
    raise ZeroDivisionError
