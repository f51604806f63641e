"""One output's text as what the client gets: answer, reasoning and tool calls."""

from dataclasses import dataclass

from baton.frontend.tools.events import Arguments, CallBegins, Content, Event, Reasoning
from baton.frontend.tools.parser import ReasoningParser, ToolParser, content
from baton.frontend.tools.scanner import Driver, Finds, Scanner


@dataclass(slots=True)
class CallPart:
    """A piece of a tool call. The first of each call has a name and an id."""

    index: int
    arguments: str = ""
    name: str = ""
    id: str = ""


Piece = Content | Reasoning | CallPart
"""What the client gets of a text, in the order in which the model wrote it."""


class OutputParser:
    """Reasoning first, then the answer with its calls."""

    def __init__(
        self,
        reasoning: ReasoningParser | None,
        tools: ToolParser | None,
        *,
        ids: ToolParser | None,
        one_call: bool,
        show_reasoning: bool,
        spaced: bool,
    ) -> None:
        """`ids` names the calls. `one_call`: later calls are left out. `spaced`: white space before the answer is none
        of it."""
        self._reasoning, self._tools, self._ids, self._spaced = reasoning, tools, ids, spaced
        self._one_call, self._show_reasoning = one_call, show_reasoning
        scanner = Scanner()
        self._driver = Driver(scanner, self._parse(scanner))
        self.num_calls = 0
        self.may_reason = reasoning is not None
        """What comes next can still be reasoning."""
        self.has_reasoned = False

    def feed(self, text: str) -> list[Piece]:
        """What is certain after this text."""
        return self._collect(self._driver.feed(text))

    def finish(self) -> list[Piece]:
        """The rest: no more text comes."""
        return self._collect(self._driver.finish())

    @property
    def held(self) -> int:
        """Characters that have come and may yet be a marker, or not."""
        return len(self._driver.rest)

    def _parse(self, scan: Scanner) -> Finds[None]:
        if self._reasoning is not None:
            for event in self._reasoning.parse(scan):
                if not (self._spaced and isinstance(event, Content)):
                    yield event
            self.may_reason = False
        if self._spaced:
            yield from scan.take_space()
        yield from self._tools.parse(scan) if self._tools is not None else content(scan)

    def _collect(self, events: list[Event]) -> list[Piece]:
        pieces: list[Piece] = []
        for event in events:
            match event:
                case Content():
                    pieces.append(event)
                case Reasoning():
                    self.has_reasoned = True
                    if self._show_reasoning:
                        pieces.append(event)
                case CallBegins(name, id):
                    assert self._ids is not None
                    self.num_calls += 1
                    if self._wanted:
                        pieces.append(CallPart(self.num_calls - 1, "", name, id or self._ids.new_id()))
                case Arguments(text):
                    if self._wanted:
                        self._append(pieces, text)
        return pieces

    @property
    def _wanted(self) -> bool:
        return not self._one_call or self.num_calls == 1

    def _append(self, pieces: list[Piece], text: str) -> None:
        last = pieces[-1] if pieces else None
        if isinstance(last, CallPart) and last.index == self.num_calls - 1:
            last.arguments += text
        else:
            pieces.append(CallPart(self.num_calls - 1, text))
