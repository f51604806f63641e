"""Between the scheduler's loop and the thread of its Admin server: questions in, answers and events out.

The loop alone touches the cluster. The server's coroutines leave questions here, which wake the loop; answers go back
through the event loop that asked.
"""

import asyncio
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from baton.scheduler_proc.instructions import Happened
from baton.scheduler_proc.operations import Operator

T = TypeVar("T")

EVENT_BACKLOG = 1000
"""Events kept for a reader; one that is further behind is ended."""


@dataclass(eq=False)
class _Question:
    ask: Callable[[Operator, float], Any]
    until: Callable[[Any], bool] | None
    answer: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop

    def settle(self, settle: Callable[[Any], None], value: Any) -> None:
        self.loop.call_soon_threadsafe(lambda: None if self.answer.done() else settle(value))


class Subscription:
    """Events for one reader, from the start of its `with` block to the end."""

    def __init__(self, desk: "Desk") -> None:
        self._desk = desk
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[Happened] = asyncio.Queue()

    async def next(self) -> Happened:
        """The oldest event that has not been read. Raises OverflowError when the reader was too slow."""
        if self._events.qsize() > EVENT_BACKLOG:
            raise OverflowError
        return await self._events.get()

    def put(self, event: Happened) -> None:
        """From the scheduler's thread."""
        self._loop.call_soon_threadsafe(self._put, event)

    def _put(self, event: Happened) -> None:
        if self._events.qsize() <= EVENT_BACKLOG:
            self._events.put_nowait(event)

    def __enter__(self) -> Self:
        self._desk.subscriptions.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        self._desk.subscriptions.remove(self)


class Desk:
    """Owns the descriptor that wakes the loop; close() frees it."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """Readable when a question was asked."""
        self.subscriptions: list[Subscription] = []
        self._asked: deque[_Question] = deque()
        self._waiting: list[_Question] = []

    async def ask(self, ask: Callable[[Operator, float], T], until: Callable[[T], bool] | None = None) -> T:
        """What `ask(operator, now)` returns in the scheduler's loop, asked again at each turn until `until` holds.

        Raises RefusedError, or whatever `ask` raises.
        """
        loop = asyncio.get_running_loop()
        question = _Question(ask, until, loop.create_future(), loop)
        self._asked.append(question)
        os.eventfd_write(self.fd, 1)
        return await question.answer

    def serve(self, operator: Operator, now: float) -> None:
        """Answer what can be answered now. Called in the scheduler's loop, at every turn."""
        while self._asked:
            self._waiting.append(self._asked.popleft())
        if self._waiting:
            self._waiting = [question for question in self._waiting if not _answered(question, operator, now)]

    def clear(self) -> None:
        """After the descriptor was found readable."""
        os.eventfd_read(self.fd)

    def publish(self, event: Happened) -> None:
        """To everybody who watches."""
        for subscription in list(self.subscriptions):
            subscription.put(event)

    def close(self) -> None:
        """The server must have ended."""
        os.close(self.fd)


def _answered(question: _Question, operator: Operator, now: float) -> bool:
    if question.answer.done():  # its caller has left
        return True
    try:
        result = question.ask(operator, now)
    except Exception as error:  # the caller's to tell: a question never ends the scheduler
        question.settle(question.answer.set_exception, error)
        return True
    if question.until is not None and not question.until(result):
        return False
    question.settle(question.answer.set_result, result)
    return True
