"""One output's text as what the client gets: answer, reasoning and tool calls."""

from dataclasses import dataclass, field

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


@dataclass(slots=True)
class Parts:
    """What a piece of text brings."""

    content: str = ""
    reasoning: str = ""
    calls: list[CallPart] = field(default_factory=list)


class OutputParser:
    """Reasoning first, then the answer with its calls."""

    def __init__(
        self, reasoning: ReasoningParser | None, tools: ToolParser | None, *, one_call: bool, show_reasoning: bool
    ) -> None:
        """`one_call`: later calls are left out."""
        self._reasoning, self._tools = reasoning, tools
        self._one_call, self._show_reasoning = one_call, show_reasoning
        scanner = Scanner()
        self._driver = Driver(scanner, self._parse(scanner))
        self.num_calls = 0

    def feed(self, text: str) -> Parts:
        """What is certain after this text."""
        return self._collect(self._driver.feed(text))

    def finish(self) -> Parts:
        """The rest: no more text comes."""
        return self._collect(self._driver.finish())

    def _parse(self, scan: Scanner) -> Finds[None]:
        if self._reasoning is not None:
            yield from self._reasoning.parse(scan)
        yield from self._tools.parse(scan) if self._tools is not None else content(scan)

    def _collect(self, events: list[Event]) -> Parts:
        parts = Parts()
        for event in events:
            match event:
                case Content(text):
                    parts.content += text
                case Reasoning(text):
                    parts.reasoning += text if self._show_reasoning else ""
                case CallBegins(name, id):
                    assert self._tools is not None
                    self.num_calls += 1
                    if self._wanted:
                        parts.calls.append(CallPart(self.num_calls - 1, "", name, id or self._tools.new_id()))
                case Arguments(text):
                    if self._wanted:
                        self._append(parts.calls, text)
        return parts

    @property
    def _wanted(self) -> bool:
        return not self._one_call or self.num_calls == 1

    def _append(self, calls: list[CallPart], text: str) -> None:
        if calls and calls[-1].index == self.num_calls - 1:
            calls[-1].arguments += text
        else:
            calls.append(CallPart(self.num_calls - 1, text))
