"""Text that comes in pieces, for parsers written as if it were all there.

A parser is a generator over a Scanner. It yields events, and None where it needs more text than has come; a Driver
feeds it. What it finds depends on the text alone, never on where the pieces were cut. No marker may contain another.
"""

from collections.abc import Generator, Iterator
from typing import TypeVar

from baton.frontend.tools.events import Event

T = TypeVar("T")
Step = Generator[None, None, T]
"""Yields None while it waits; returns T."""
Finds = Generator[Event | None, None, T]
"""Also yields events."""


class EndOfTextError(Exception):
    """The text ended where more was needed."""


class Scanner:
    """The text that has come and has not been consumed."""

    def __init__(self) -> None:
        self.rest = ""
        self.ended = False
        self._taken: list[str] | None = None

    def take(self, count: int) -> str:
        """Consume so many characters, which must be there."""
        taken, self.rest = self.rest[:count], self.rest[count:]
        if self._taken is not None:
            self._taken.append(taken)
        return taken

    def record(self) -> None:
        """Remember what is consumed from now on."""
        self._taken = []

    def recorded(self) -> str:
        """What was consumed since `record`."""
        text = "".join(self._taken or ())
        self._taken = None
        return text

    def stop_recording(self) -> None:
        """What was consumed is not needed any more."""
        self._taken = None

    def need(self, count: int) -> Step[None]:
        """Wait until so many characters are there. Raises EndOfTextError."""
        while len(self.rest) < count:
            if self.ended:
                raise EndOfTextError
            yield

    def peek(self) -> Step[str]:
        """The next character. Raises EndOfTextError."""
        yield from self.need(1)
        return self.rest[0]

    def skip_space(self) -> Step[str]:
        """Consume white space; returns the character behind it. Raises EndOfTextError."""
        while True:
            char = yield from self.peek()
            if not char.isspace():
                return char
            self.take(1)

    def take_space(self) -> Step[str]:
        """Consume white space and return it, also at the end of the text."""
        taken = ""
        while (yield from self.starts_with(" ", "\n", "\t", "\r")):
            taken += self.take(1)
        return taken

    def starts_with(self, *markers: str) -> Step[str | None]:
        """Which of the markers comes next; None when none does, also at the end of the text."""
        while True:
            for marker in markers:
                if self.rest.startswith(marker):
                    return marker
            if self.ended or not any(marker.startswith(self.rest) for marker in markers):
                return None
            yield

    def until(self, *markers: str) -> Generator[str | None, None, str | None]:
        """Consume and yield text, in pieces, up to the first marker, which is consumed and returned.

        Returns None at the end of the text, all of which has been yielded then.
        """
        while True:
            found = [(at, marker) for marker in markers if (at := self.rest.find(marker)) >= 0]
            at, marker = min(found, default=(-1, ""), key=lambda item: item[0])
            ready = at if found else len(self.rest) - _partial(self.rest, markers)
            if not found and self.ended:
                ready = len(self.rest)
            if ready:
                yield self.take(ready)
            if found:
                self.take(len(marker))
                return marker
            if self.ended:
                return None
            yield None

    def text_until(self, *markers: str) -> Step[str]:
        """As `until`, but all in one. Raises EndOfTextError when no marker comes."""
        parts: list[str] = []
        pieces = self.until(*markers)
        while True:
            try:
                piece = next(pieces)
            except StopIteration as stop:
                if stop.value is None:
                    raise EndOfTextError from None
                return "".join(parts)
            if piece is None:
                yield
            else:
                parts.append(piece)


class Driver:
    """Feeds a parser and collects what it finds."""

    def __init__(self, scanner: Scanner, parser: Iterator[Event | None]) -> None:
        self._scanner = scanner
        self._parser = parser
        self._over = False

    def feed(self, text: str) -> list[Event]:
        """What is certain after this text."""
        self._scanner.rest += text
        return self._run()

    def finish(self) -> list[Event]:
        """The rest: no more text comes."""
        self._scanner.ended = True
        return self._run()

    @property
    def rest(self) -> str:
        """What the parser has not read yet, or left unread when it ended."""
        return self._scanner.rest

    def _run(self) -> list[Event]:
        events: list[Event] = []
        while not self._over:
            try:
                event = next(self._parser)
            except (StopIteration, EndOfTextError):
                self._over = True
                break
            if event is None:
                break
            events.append(event)
        return events


def _partial(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of `text` that begins a marker."""
    longest = 0
    for marker in markers:
        for size in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:size]):
                longest = size
                break
    return longest
