"""One answer in the making, for APIs that write it down in events of their own."""

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError
from baton.frontend.api.generation import Generator, Job
from baton.frontend.api.params import context_room
from baton.frontend.api.sse import named_event
from baton.frontend.engine_client import OutputReader
from baton.frontend.model_info import ModelInfo


class Answer(Protocol):
    """Writes an answer down. What its methods return are events: structs whose tag is their name."""

    def take(self, delta: Delta) -> list[object]:
        """More of it."""

    def finish(self, delta: Delta, choice: Choice) -> list[object]:
        """Its end: `delta` is the last, which was taken, `choice` has the counts."""

    def fail(self, error: ApiError) -> list[object]:
        """Its end, for a reason of the server's."""


class Run:
    """Reads a job's one stream into an answer. It is http_io.Events, for an answer that is streamed."""

    def __init__(self, reader: OutputReader, choice: Choice, answer: Answer) -> None:
        self.answer = answer
        self.over = False
        """Nothing more comes from the cluster."""
        self._reader = reader
        self._choice = choice
        self._begun = False
        self._failure: ApiError | None = None
        self._wake: Callable[[], None] = lambda: None
        self._last: list[object] = []
        """Events that ended it from outside."""

    @property
    def ended(self) -> bool:
        """The last event has been taken."""
        return self.over and not self._last

    def on_output(self, callback: Callable[[], None]) -> None:
        """Call this when something has come after everything was taken."""
        self._wake = self._reader.on_output = callback

    def take(self) -> bytes:
        """As `advance`, rendered."""
        return b"".join(map(named_event, self.advance()))

    def advance(self) -> list[object]:
        """The events of what has come. Raises ApiError before the first one; a later error is an event."""
        events, self._last = self._last, []
        if self.over:
            return events
        try:
            for output in self._reader.take().values():
                delta = self._choice.take(output, self._reader)
                events += self.answer.take(delta)
                self._begun = True
                if delta.finish_reason is not None:
                    events += self.answer.finish(delta, self._choice)
                    self.over = True
        except ApiError as error:
            if not self._begun:
                raise
            self._failure = error
            events += self.answer.fail(error)
            self.over = True
        return events

    async def whole(self) -> None:
        """Read to the end, for an answer in one piece. Raises ApiError."""
        async for _ in self.steps():
            pass
        if self._failure is not None:
            raise self._failure

    async def steps(self) -> AsyncIterator[list[object]]:
        """The events, as they come. Raises ApiError before the first one."""
        come = asyncio.Event()
        self.on_output(come.set)
        while not self.ended:
            await come.wait()
            come.clear()
            yield self.advance()

    def end(self, events: list[object]) -> None:
        """End it from outside; `events` are its last."""
        if self.over:
            return
        self._reader.abort()
        self.over, self._last = True, events
        self._wake()


@contextmanager
def running(generator: Generator, job: Job, answer: Answer) -> Iterator[Run]:
    """The job on the cluster; what still runs at the end of the block is aborted. Raises ApiError."""
    with generator.open(job) as (reader, (choice,)):
        yield Run(reader, choice, answer)


def within_context(job: Job, info: ModelInfo, param: str) -> Job:
    """The job with no more tokens than the context has room for: here max_tokens is an upper bound.

    Raises ApiError when not even one fits.
    """
    wishes = job.wishes
    room = context_room(len(job.prompts[0].ids), info, param)
    if wishes.max_tokens is None or wishes.max_tokens <= room:
        return job
    return dataclasses.replace(job, wishes=dataclasses.replace(wishes, max_tokens=room))
