"""Tool calls written as JSON, taken apart while they are being written."""

import json
from collections.abc import Container, Generator
from typing import Any

from baton.frontend.tools.events import Arguments, CallBegins, Content
from baton.frontend.tools.scanner import EndOfTextError, Finds, Scanner, Step

NAME_KEYS = ("name", "function")
ARGUMENT_KEYS = ("arguments", "parameters")


class MalformedError(Exception):
    """This is no call."""


def json_value(scan: Scanner) -> Generator[str | None, None, None]:
    """Consume one JSON value and yield its text in pieces, as written. Raises MalformedError, EndOfTextError."""
    first = yield from scan.skip_space()
    if first in "}],:":
        raise MalformedError
    depth, in_string, escaped = 0, False, False
    while True:
        yield from scan.need(1)
        for index, char in enumerate(scan.rest):
            if in_string:
                in_string = escaped or char != '"'
                escaped = not escaped and char == "\\"
                done = not in_string and depth == 0
            elif char == '"':
                in_string, done = True, False
            else:
                depth += (char in "{[") - (char in "}]")
                if depth < 0 or (depth == 0 and (char in ",:" or char.isspace())):  # the end of a number or a word
                    if index:
                        yield scan.take(index)
                    return
                done = depth == 0 and char in "}]"
            if done:
                yield scan.take(index + 1)
                return
        yield scan.take(len(scan.rest))


def whole_value(scan: Scanner) -> Step[Any]:
    """Consume one JSON value and return it. Raises MalformedError, EndOfTextError."""
    return _read((yield from _whole_text(scan)))


def arguments(scan: Scanner) -> Finds[None]:
    """Consume a JSON value as arguments; a string is taken to hold the JSON."""
    first = yield from scan.skip_space()
    if first == '"':
        yield Arguments((yield from whole_arguments(scan)))
        return
    for piece in json_value(scan):
        yield None if piece is None else Arguments(piece)


def whole_arguments(scan: Scanner) -> Step[str]:
    """As `arguments`, all in one. Raises MalformedError, EndOfTextError."""
    text = yield from _whole_text(scan)
    value = _read(text)
    return value if isinstance(value, str) else text


def bare_value(value: str, is_string: bool) -> str:
    """As JSON, a value that a model writes without quotes: one that is no JSON is a string in any case."""
    if not is_string:
        try:
            _read(value)
        except MalformedError:
            pass
        else:
            return value.strip()
    return json.dumps(value, ensure_ascii=False)


def call_object(scan: Scanner, names: Container[str] | None = None) -> Finds[None]:
    """Consume an object with a name and arguments, in any order. Raises MalformedError, EndOfTextError.

    Nothing is yielded before the name is known. `names` that a call may have; None: any.
    """
    yield from _expect(scan, "{")
    begun, given, early = False, False, ""
    while (char := (yield from scan.skip_space())) != "}":
        if char == ",":
            scan.take(1)
            continue
        key = yield from whole_value(scan)
        yield from _expect(scan, ":")
        if key in NAME_KEYS and not begun:
            name = yield from whole_value(scan)
            if not isinstance(name, str) or not name or (names is not None and name not in names):
                raise MalformedError
            yield CallBegins(name)
            begun = True
            if given:
                yield Arguments(early)
        elif key in ARGUMENT_KEYS and not given:
            given = True
            if begun:
                yield from arguments(scan)
            else:
                early = yield from whole_arguments(scan)
        else:
            yield from whole_value(scan)
    scan.take(1)
    if not begun:
        raise MalformedError
    if not given:
        yield Arguments("{}")


def or_content(scan: Scanner, calls: Finds[None], before: str = "") -> Finds[bool]:
    """Run a parser of calls; returns whether all was calls. What can't be read is content from the last event on.

    A name is told with the first arguments: while nothing else has come, all may yet be content.
    `before` was consumed already and belongs to the content then. Raises EndOfTextError.
    """
    scan.record()
    name: CallBegins | None = None
    begun = False
    try:
        for event in calls:
            if isinstance(event, CallBegins):
                name = event
                continue
            if event is not None:
                if name is not None:
                    yield name
                begun, name, before = True, None, ""
                scan.record()
            yield event
    except MalformedError:
        if text := before + scan.recorded():
            yield Content(text)
        return False
    except EndOfTextError:
        if name is not None or not begun:
            yield Content(before + scan.recorded() + scan.rest)
        raise
    scan.stop_recording()
    return begun


def call_array(scan: Scanner) -> Finds[None]:
    """Consume a list of call objects; each but the first begins a record. Raises MalformedError, EndOfTextError."""
    yield from _expect(scan, "[")
    behind_a_call = False
    while (char := (yield from scan.skip_space())) != "]":
        if char == ",":
            scan.take(1)
            continue
        if behind_a_call:
            scan.record()
        yield from call_object(scan)
        behind_a_call = True
    scan.take(1)


def _whole_text(scan: Scanner) -> Step[str]:
    """Consume one JSON value and return it as written."""
    parts = []
    for piece in json_value(scan):
        if piece is None:
            yield
        else:
            parts.append(piece)
    return "".join(parts)


def _read(text: str) -> Any:
    """A JSON value. A string has U+FFFD for half a surrogate pair, which models write and nobody can encode."""
    try:
        value = json.loads(text, parse_constant=_no_json)
    except (ValueError, RecursionError) as error:
        raise MalformedError from error
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _no_json(constant: str) -> None:
    """NaN, Infinity and -Infinity, which Python would take."""
    raise ValueError(constant)


def _expect(scan: Scanner, char: str) -> Step[None]:
    if (yield from scan.skip_space()) != char:
        raise MalformedError
    scan.take(1)
