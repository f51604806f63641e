"""GLM 4.5 and later: `<tool_call>name <arg_key>k</arg_key> <arg_value>v</arg_value> … </tool_call>`."""

import json
from typing import Any

from baton.frontend.tools.events import Arguments, CallBegins
from baton.frontend.tools.json_calls import MalformedError, bare_value, or_content
from baton.frontend.tools.parser import ToolParser, content
from baton.frontend.tools.scanner import Finds, Scanner

_START, _END = "<tool_call>", "</tool_call>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"


class GlmParser(ToolParser):
    """Values are bare: whether 5 is a number or a string, the tool's schema says."""

    names = ("glm45", "glm47")
    markers = (_START, _END, _KEY, _KEY_END, _VALUE, _VALUE_END)

    def parse(self, scan: Scanner) -> Finds[None]:
        while (yield from content(scan, _START)):
            if (yield from or_content(scan, self._call(scan), _START)):
                yield from scan.take_space()

    def _call(self, scan: Scanner) -> Finds[None]:
        name = ""
        while (yield from scan.starts_with(_KEY, _END)) is None:
            yield from scan.need(1)
            name += scan.take(1)
        name = name.strip()
        if not name:
            raise MalformedError
        yield CallBegins(name)
        yield from self._arguments(scan, self._properties(name))

    def _arguments(self, scan: Scanner, properties: dict[str, Any]) -> Finds[None]:
        written = "{"
        while (yield from _next(scan)) == _KEY:
            key = (yield from scan.text_until(_KEY_END)).strip()
            yield from scan.text_until(_VALUE)
            value = yield from scan.text_until(_VALUE_END)
            schema = properties.get(key)
            is_string = isinstance(schema, dict) and schema.get("type") == "string"
            text = json.dumps(key, ensure_ascii=False) + ": " + bare_value(value, is_string)
            yield Arguments(written + text)
            written = ", "
        yield Arguments("}" if written != "{" else "{}")

    def _properties(self, name: str) -> dict[str, Any]:
        for tool in self.tools:
            function = tool.get("function") or {}
            if function.get("name") == name:
                properties = (function.get("parameters") or {}).get("properties")
                return properties if isinstance(properties, dict) else {}
        return {}


def _next(scan: Scanner) -> Finds[str]:
    """The next key's or the call's end marker; consumed."""
    while (marker := (yield from scan.starts_with(_KEY, _END))) is None:
        yield from scan.need(1)
        scan.take(1)
    scan.take(len(marker))
    return marker
