"""DeepSeek V3, R1 and V3.1: calls between special tokens, before V3.1 with their arguments in a fenced block."""

from typing import ClassVar

from baton.frontend.tools.events import CallBegins, Content
from baton.frontend.tools.json_calls import MalformedError, arguments, or_content
from baton.frontend.tools.parser import ToolParser, call_sections, content
from baton.frontend.tools.scanner import Finds, Scanner

_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"


class DeepSeekV31Parser(ToolParser):
    """`<｜tool▁call▁begin｜>name<｜tool▁sep｜>{…}<｜tool▁call▁end｜>`"""

    names: ClassVar[tuple[str, ...]] = ("deepseek_v31",)
    markers = (_CALLS, _CALLS_END, _CALL, _CALL_END, _SEPARATOR)

    def parse(self, scan: Scanner) -> Finds[None]:
        yield from call_sections(scan, _CALLS, _CALL, _CALLS_END, self._to_the_end)

    def _to_the_end(self, scan: Scanner) -> Finds[None]:
        if (yield from or_content(scan, self._call(scan), _CALL)):
            yield from scan.text_until(_CALL_END)
        elif (yield from content(scan, _CALL_END)):
            yield Content(_CALL_END)

    def _call(self, scan: Scanner) -> Finds[None]:
        name = yield from scan.text_until(_SEPARATOR)
        yield from self._arguments_of(scan, name)

    def _arguments_of(self, scan: Scanner, name: str) -> Finds[None]:
        if not name.strip():
            raise MalformedError
        yield CallBegins(name.strip())
        yield from arguments(scan)


class DeepSeekV3Parser(DeepSeekV31Parser):
    """`<｜tool▁call▁begin｜>function<｜tool▁sep｜>name\\n```json\\n{…}\\n```<｜tool▁call▁end｜>`"""

    names: ClassVar[tuple[str, ...]] = ("deepseek_v3",)

    def _call(self, scan: Scanner) -> Finds[None]:
        yield from scan.text_until(_SEPARATOR)
        name = yield from scan.text_until("\n")
        yield from scan.text_until("```json")
        yield from self._arguments_of(scan, name)
