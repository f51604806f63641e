"""A response's input and output items as the messages of a chat request."""

import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.api.responses_api.objects import OutputItem
from baton.frontend.api.responses_api.requests import InputItem, InputPart

_ROLES = ("user", "assistant", "system", "developer")
_TEXTS = ("input_text", "output_text", "text")
_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def new_id(prefix: str) -> str:
    """Of a new item."""
    return f"{prefix}_{uuid.uuid4().hex}"


def read_input(given: str | list[InputItem]) -> list[InputItem]:
    """The items, each with its type, an id and its content in parts. Raises ApiError naming the item that is wrong."""
    if isinstance(given, str):
        given = [InputItem(role="user", content=given)]
    if not given:
        raise bad_request("input must not be empty.", "input")
    return [_checked(item, f"input[{index}]") for index, item in enumerate(given)]


def as_input(output: Sequence[OutputItem]) -> list[InputItem]:
    """Output items as the input of what follows."""
    return msgspec.convert(msgspec.to_builtins(output), list[InputItem])


def to_messages(items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """Chat messages. Reasoning, text and calls of one turn of the assistant become one message."""
    messages: list[dict[str, Any]] = []
    for item in items:
        match item.type:
            case "message" if item.role == "assistant":
                _say(messages, _joined(item.content))
            case "message":
                messages.append({"role": item.role, "content": _content(item.content)})
            case "reasoning":
                text = _joined(item.content) or _joined(item.summary)
                messages.append({"role": "assistant", "content": None, "reasoning": text, "reasoning_content": text})
            case "function_call":
                function = {"name": item.name, "arguments": item.arguments}
                call = {"id": item.call_id, "type": "function", "function": function}
                _turn(messages).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": item.call_id, "content": _content(item.output)})
    return messages


def _say(messages: list[dict[str, Any]], text: str) -> None:
    """Text of the assistant, which belongs to the turn before it when that has none yet, or has gone on to calls."""
    last = messages[-1] if messages else {}
    if last.get("role") != "assistant" or (last["content"] is not None and "tool_calls" not in last):
        messages.append({"role": "assistant", "content": text})
    else:
        last["content"] = (last["content"] or "") + text


def _turn(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """The turn of the assistant that goes on."""
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _checked(item: InputItem, where: str) -> InputItem:
    kind = item.type or ("message" if item.role is not UNSET else "")
    changes: dict[str, Any] = {"type": kind}
    match kind:
        case "message":
            if item.role not in _ROLES:
                raise bad_request(f"{where}.role must be one of {', '.join(_ROLES)}.", f"{where}.role")
            changes["content"] = _parts(item.content, f"{where}.content", item.role == "assistant")
            changes["status"] = "completed" if item.status in (UNSET, None) else item.status
        case "reasoning":
            changes["summary"] = item.summary or []
            if item.content:
                changes["content"] = _parts(item.content, f"{where}.content", False, ("reasoning_text",))
        case "function_call":
            _need(item, where, "call_id", "name", "arguments")
        case "function_call_output":
            _need(item, where, "call_id", "output")
            if not isinstance(item.output, str):
                changes["output"] = _parts(item.output, f"{where}.output", False)
        case _:
            raise _unsupported(where, kind)
    if not item.id:
        changes["id"] = new_id(_PREFIXES[kind])
    return msgspec.structs.replace(item, **changes)


def _need(item: InputItem, where: str, *names: str) -> None:
    for name in names:
        if getattr(item, name) is UNSET:
            raise bad_request(f"{where} of type {item.type} needs the field {name}.", f"{where}.{name}")


def _parts(content: Any, where: str, by_model: bool, kinds: tuple[str, ...] = _TEXTS) -> list[InputPart]:
    if isinstance(content, str):
        content = [InputPart(type="output_text" if by_model else "input_text", text=content)]
    if not isinstance(content, list):
        raise bad_request(f"{where} must be a string or a list of parts.", where)
    return [_part(part, f"{where}[{index}]", kinds) for index, part in enumerate(content)]


def _part(part: InputPart, where: str, kinds: tuple[str, ...]) -> InputPart:
    if part.type == "refusal" and part.refusal is not UNSET:
        return part
    if part.type not in kinds or part.text is UNSET:
        raise bad_request(
            f"{where} is a part of type {part.type[:64]!r}; this model takes text only: {', '.join(kinds)}.", where
        )
    return msgspec.structs.replace(part, annotations=[]) if part.type == "output_text" else part


def _unsupported(where: str, kind: str) -> ApiError:
    known = ", ".join(_PREFIXES)
    hint = " Send the item itself, or use previous_response_id." if kind == "item_reference" else ""
    return bad_request(f"{where} is of type {kind[:64]!r}; known are {known}.{hint}", f"{where}.type", "unsupported")


def _content(content: Any) -> Any:
    """One text as a string, several as the parts of a chat message."""
    if isinstance(content, str):
        return content
    parts = [{"type": "text", "text": _text(part)} for part in content]
    return parts[0]["text"] if len(parts) == 1 else parts


def _joined(parts: Any) -> str:
    return "".join(map(_text, parts)) if isinstance(parts, list) else ""


def _text(part: InputPart) -> str:
    return part.text or part.refusal or ""  # UNSET is false
