"""Outputs that a grammar holds to calls: one tool's arguments, or a list of calls."""

from baton.frontend.tools.events import Arguments, CallBegins
from baton.frontend.tools.json_calls import call_array, or_content
from baton.frontend.tools.parser import ToolParser
from baton.frontend.tools.scanner import Finds, Scanner


class RequiredParser(ToolParser):
    """tool_choice required: `[{"name": …, "parameters": {…}}, …]`"""

    def parse(self, scan: Scanner) -> Finds[None]:
        yield from or_content(scan, call_array(scan))


class NamedParser(ToolParser):
    """tool_choice with a name: the arguments alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def parse(self, scan: Scanner) -> Finds[None]:
        yield from scan.need(1)  # an output that ended within its reasoning calls nothing
        yield CallBegins(self._name)
        for piece in scan.until():
            yield None if piece is None else Arguments(piece)
