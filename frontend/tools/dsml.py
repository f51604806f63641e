"""DeepSeek V3.2: calls in its markup language, one tag a call and one an argument."""

import json

from baton.frontend.tools.events import Arguments, CallBegins, Content
from baton.frontend.tools.json_calls import MalformedError, bare_value, or_content
from baton.frontend.tools.parser import ToolParser, call_sections, content
from baton.frontend.tools.scanner import Finds, Scanner

_TOKEN = "｜DSML｜"
_CALLS, _CALLS_END = f"<{_TOKEN}function_calls>", f"</{_TOKEN}function_calls>"
_CALL, _CALL_END = f'<{_TOKEN}invoke name="', f"</{_TOKEN}invoke>"
_ARGUMENT, _KIND, _ARGUMENT_END = f'<{_TOKEN}parameter name="', '" string="', f"</{_TOKEN}parameter>"
_TAG_END = '">'


class DsmlParser(ToolParser):
    """`<｜DSML｜invoke name="f"><｜DSML｜parameter name="k" string="true">v</｜DSML｜parameter></｜DSML｜invoke>`"""

    names = ("deepseek_v32",)
    markers = (_TOKEN,)

    def parse(self, scan: Scanner) -> Finds[None]:
        yield from call_sections(scan, _CALLS, _CALL, _CALLS_END, _call_or_text)


def _call_or_text(scan: Scanner) -> Finds[None]:
    if not (yield from or_content(scan, _call(scan), _CALL)) and (yield from content(scan, _CALL_END)):
        yield Content(_CALL_END)


def _call(scan: Scanner) -> Finds[None]:
    name = yield from scan.text_until(_TAG_END)
    if not name:
        raise MalformedError
    yield CallBegins(name)
    yield from _arguments(scan)


def _arguments(scan: Scanner) -> Finds[None]:
    written = "{"
    while True:
        yield from scan.take_space()
        if (yield from scan.starts_with(_ARGUMENT)) is None:
            break
        scan.take(len(_ARGUMENT))
        name = yield from scan.text_until(_KIND)
        is_string = (yield from scan.text_until(_TAG_END)) == "true"
        value = yield from scan.text_until(_ARGUMENT_END)
        yield Arguments(f"{written}{json.dumps(name, ensure_ascii=False)}: {bare_value(value, is_string)}")
        written = ", "
    yield from scan.text_until(_CALL_END)
    yield Arguments("}" if written != "{" else "{}")
