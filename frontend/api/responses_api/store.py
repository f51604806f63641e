"""Responses that clients may come back to: those that run, and of those that have ended the latest.

It lives in one frontend's memory and ends with it. `owner_of` says whose a response is.
"""

import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import msgspec

from baton.frontend.api.errors import ApiError, unavailable
from baton.frontend.api.responses import encode
from baton.frontend.api.responses_api.answer import ResponseAnswer
from baton.frontend.api.responses_api.items import as_input
from baton.frontend.api.responses_api.objects import ResponsesResponse
from baton.frontend.api.responses_api.requests import InputItem
from baton.frontend.api.run import Run

PREFIX = "resp_"
_OWNER_DIGITS = 4
_RANDOM_BYTES = 14


def new_response_id(owner: int) -> str:
    """An id that says which frontend has the response."""
    return f"{PREFIX}{owner:0{_OWNER_DIGITS}x}{secrets.token_hex(_RANDOM_BYTES)}"


def owner_of(id: str) -> int | None:
    """Index of the frontend that gave the id; None for what is no id of ours."""
    digits = id.removeprefix(PREFIX)
    if len(id) != len(PREFIX) + len(digits) or len(digits) != _OWNER_DIGITS + 2 * _RANDOM_BYTES:
        return None
    try:
        return int(digits[:_OWNER_DIGITS], 16)
    except ValueError:
        return None


class EventLog:
    """The events of a background response; the index of each is its sequence number."""

    def __init__(self) -> None:
        self.events: list[bytes] = []
        self.ended = False
        self.size = 0
        """Bytes."""
        self._wake: set[Callable[[], None]] = set()

    def append(self, events: Sequence[bytes], ended: bool) -> None:
        """More of them, and whether these are the last."""
        self.events += events
        self.size += sum(map(len, events))
        self.ended = ended
        for wake in [*self._wake]:
            wake()

    @contextmanager
    def follow(self, after: int) -> "Iterator[LogReader]":
        """From the event behind number `after` on."""
        reader = LogReader(self, after + 1)
        self._wake.add(reader.wake)
        try:
            yield reader
        finally:
            self._wake.discard(reader.wake)


class LogReader:
    """One client's way through a log. It is http_io.Events."""

    def __init__(self, log: EventLog, position: int) -> None:
        self._log = log
        self._position = position
        self._callback: Callable[[], None] = lambda: None

    @property
    def ended(self) -> bool:
        """The last event has been taken."""
        return self._log.ended and self._position >= len(self._log.events)

    def take(self) -> bytes:
        """What has come since the last time."""
        data = b"".join(self._log.events[self._position :])
        self._position = max(self._position, len(self._log.events))
        return data

    def on_output(self, callback: Callable[[], None]) -> None:
        """Call this when something has come; at once when there is something already."""
        self._callback = callback
        self.wake()

    def wake(self) -> None:
        """Something has come."""
        self._callback()


@dataclass(eq=False)
class Live:
    """A response that runs."""

    tenant: str
    answer: ResponseAnswer
    run: Run
    items: list[InputItem]
    """What it answers: everything that was said before, and the input."""
    log: EventLog | None = None
    """In the background, when it was asked for as a stream."""

    def input_items(self) -> list[InputItem]:
        """As `items`."""
        return self.items


@dataclass(frozen=True, eq=False)
class Kept:
    """A response that has ended."""

    tenant: str
    response: bytes
    """JSON."""
    items: bytes
    """JSON."""
    log: EventLog | None

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.response) + len(self.items) + (self.log.size if self.log is not None else 0)

    def input_items(self) -> list[InputItem]:
        """What it answers."""
        return msgspec.json.decode(self.items, type=list[InputItem])

    def conversation(self) -> list[InputItem]:
        """What was said up to and with this response."""
        return self.input_items() + as_input(msgspec.json.decode(self.response, type=ResponsesResponse).output)


class ResponseStore:
    """Bounded by count and bytes of those that have ended; the oldest leaves first."""

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._live: dict[str, Live] = {}
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self._bytes = 0

    def begin(self, id: str, live: Live) -> None:
        """A response that runs from now on."""
        self._live[id] = live

    def check_background(self) -> None:
        """Raises ApiError (429) when as many run already as can be kept."""
        if len(self._live) >= self._max_responses:
            raise unavailable(f"{len(self._live)} stored responses are running; try again later", status=429)

    def forget(self, id: str) -> None:
        """It did not come to a response."""
        self._live.pop(id, None)

    def end(self, id: str) -> None:
        """It has ended: from now on what it has become is kept, unless it has been deleted."""
        live = self._live.pop(id, None)
        if live is None:
            return
        kept = Kept(live.tenant, encode(live.answer.snapshot()), encode(live.items), live.log)
        self._kept[id] = kept
        self._bytes += kept.size
        while self._bytes > self._max_bytes or len(self._kept) > self._max_responses:
            self._bytes -= self._kept.popitem(last=False)[1].size

    def get(self, id: str, tenant: str) -> Live | Kept:
        """Raises ApiError (404) when there is none, or when it is somebody else's."""
        found = self._live.get(id) or self._kept.get(id)
        if found is None or found.tenant != tenant:
            raise ApiError(404, f"Response with id '{id[:64]}' not found.", param="response_id")
        return found

    def delete(self, id: str, tenant: str) -> Live | None:
        """Forget it; returned if it runs. Raises as `get`."""
        found = self.get(id, tenant)
        if isinstance(found, Live):
            return self._live.pop(id)
        self._bytes -= self._kept.pop(id).size
        return None
