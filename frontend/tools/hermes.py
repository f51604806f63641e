"""Hermes and Qwen: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`, as often as there are calls."""

from baton.frontend.tools.json_calls import call_object, or_content
from baton.frontend.tools.parser import ToolParser, content
from baton.frontend.tools.scanner import Finds, Scanner

_START, _END = "<tool_call>", "</tool_call>"


class HermesParser(ToolParser):
    """Also of Qwen 2.5 and Qwen 3. White space around calls is no content."""

    names = ("hermes", "qwen")
    markers = (_START, _END)

    def parse(self, scan: Scanner) -> Finds[None]:
        while (yield from content(scan, _START)):
            if (yield from or_content(scan, call_object(scan), _START)):
                yield from scan.text_until(_END)
                yield from scan.take_space()
