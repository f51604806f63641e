"""Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, since tokenizer 11 `[TOOL_CALLS]name[ARGS]{…}`."""

import secrets
import string

from baton.frontend.tools.events import CallBegins
from baton.frontend.tools.json_calls import MalformedError, arguments, call_array, or_content
from baton.frontend.tools.parser import ToolParser, content
from baton.frontend.tools.scanner import Finds, Scanner

_START, _ARGS, _CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
_ID_CHARS = string.ascii_letters + string.digits


class MistralParser(ToolParser):
    """Its ids are nine letters or digits: the model's template takes no others back."""

    names = ("mistral",)
    markers = (_START, _ARGS, _CALL_ID)

    def new_id(self) -> str:
        return "".join(secrets.choice(_ID_CHARS) for _ in range(9))

    def parse(self, scan: Scanner) -> Finds[None]:
        while (yield from content(scan, _START)):
            space = yield from scan.take_space()
            listed = yield from scan.starts_with("[")
            calls = call_array(scan) if listed else _named(scan)
            if (yield from or_content(scan, calls, _START + space)):
                yield from scan.take_space()


def _named(scan: Scanner) -> Finds[None]:
    """name[CALL_ID]id[ARGS]{…}, name[ARGS]{…} or name{…}"""
    name, id = "", ""
    while (marker := (yield from scan.starts_with("{", _ARGS, _CALL_ID))) is None:
        yield from scan.need(1)
        name += scan.take(1)
    if not name.strip():
        raise MalformedError
    if marker == _CALL_ID:
        scan.take(len(_CALL_ID))
        id = yield from scan.text_until(_ARGS)
    elif marker == _ARGS:
        scan.take(len(_ARGS))
    yield CallBegins(name.strip(), id)
    yield from arguments(scan)
