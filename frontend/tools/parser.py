"""The two kinds of parsers. A plug-in is a subclass of one of them in a file of its own.

class Mine(ToolParser):
    names = ("mine",)
    markers = ("<call>",)

    def parse(self, scan):
        while (yield from content(scan, "<call>")):
            ...
"""

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from baton.frontend.tools.events import Content, Event, Reasoning
from baton.frontend.tools.scanner import Driver, Finds, Scanner


class Parser(ABC):
    """Finds events in one output's text."""

    names: ClassVar[tuple[str, ...]] = ()
    """What --tool-call-parser or --reasoning-parser call it."""
    markers: ClassVar[tuple[str, ...]] = ()
    """Texts that it looks for. Those that are special tokens of the model stay in the text."""

    @abstractmethod
    def parse(self, scan: Scanner) -> Finds[None]:
        """Read the text to its end."""

    def drive(self) -> Driver:
        """A new text for this parser."""
        scanner = Scanner()
        return Driver(scanner, self.parse(scanner))


class ToolParser(Parser):
    """Finds tool calls in text."""

    def __init__(self, tools: Sequence[dict[str, Any]] = ()) -> None:
        """`tools` as the client gave them."""
        self.tools = tools

    def new_id(self) -> str:
        """Of a call whose text names none."""
        return f"chatcmpl-tool-{uuid.uuid4().hex}"


class ReasoningParser(Parser):
    """Tells reasoning from the answer.

    After the reasoning `parse` returns, and the rest of the text belongs to the answer.
    """

    start: ClassVar[str] = "<think>"
    end: ClassVar[str] = "</think>"
    always: ClassVar[bool] = False
    """The model reasons even when neither its prompt nor its output says `start`."""

    def __init__(self, prompt_end: str) -> None:
        """`prompt_end`: the last text of the prompt, where templates open or close the reasoning."""
        prompt_end = prompt_end.rstrip()
        self.closed = prompt_end.endswith(self.end)
        self.open = prompt_end.endswith(self.start) or (self.always and not self.closed)


def content(scan: Scanner, *markers: str) -> Finds[str | None]:
    """Text up to a marker is content; returns the marker, None at the end."""
    pieces = scan.until(*markers)
    while True:
        try:
            piece = next(pieces)
        except StopIteration as stop:
            marker: str | None = stop.value
            return marker
        yield None if piece is None else Content(piece)


def reasoning(scan: Scanner, end: str) -> Finds[None]:
    """Text up to `end` is reasoning."""
    for piece in scan.until(end):
        yield None if piece is None else Reasoning(piece)


__all__ = ["Driver", "Event", "Parser", "ReasoningParser", "ToolParser", "content", "reasoning"]


def call_sections(
    scan: Scanner, begin: str, call: str, end: str, read: Callable[[Scanner], Finds[None]]
) -> Finds[None]:
    """Text with sections of calls from `begin` to `end`. Each call begins with `call`; `read` consumes what follows."""
    while (yield from content(scan, begin)):
        while True:
            yield from scan.take_space()
            if (yield from scan.starts_with(call)) is None:
                break
            scan.take(len(call))
            yield from read(scan)
        if (yield from scan.starts_with(end)):
            scan.take(len(end))
