"""Tools as clients describe them, and the grammars of outputs that must call one."""

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from baton.frontend.api.errors import bad_request
from baton.frontend.structured.constraint import Constraint, schema_constraint

MAX_TOOLS = 128
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


class Function(msgspec.Struct, kw_only=True):
    """What a tool is called and takes."""

    name: str
    description: str | None = None
    parameters: Annotated[dict[str, Any] | None, Meta(description="JSON schema; absent: none")] = None
    strict: bool | None = None


class Tool(msgspec.Struct, kw_only=True):
    """Only functions are known."""

    type: str = "function"
    function: Function


class FunctionName(msgspec.Struct):
    """Which one."""

    name: str


class NamedTool(msgspec.Struct, kw_only=True):
    """This tool must be called."""

    type: str = "function"
    function: FunctionName


ToolChoice = str | NamedTool


def check_tools(tools: list[Tool] | None, choice: ToolChoice | None) -> ToolChoice:
    """The choice, with its default. Raises ApiError naming what is wrong."""
    if not tools:
        if choice is None or choice in ("none", "auto"):
            return "none"
        raise bad_request("tool_choice needs tools.", "tool_choice")
    if len(tools) > MAX_TOOLS:
        raise bad_request(f"tools has {len(tools)} entries; at most {MAX_TOOLS} are possible.", "tools")
    for index, tool in enumerate(tools):
        if tool.type != "function" or not tool.function.name:
            raise bad_request(f"tools[{index}] must have the type 'function' and a name.", "tools")
    if choice is None:
        return "auto"
    if isinstance(choice, NamedTool):
        known = [tool.function.name for tool in tools]
        if choice.function.name not in known:
            raise bad_request(
                f"tool_choice names {choice.function.name!r}, which is not among tools: {', '.join(known[:20])}.",
                "tool_choice",
            )
    elif choice not in ("none", "auto", "required"):
        raise bad_request("tool_choice must be none, auto, required or name a tool.", "tool_choice")
    return choice


def named_constraint(tools: list[Tool], name: str) -> Constraint:
    """The arguments of one tool."""
    return schema_constraint(_parameters(next(tool for tool in tools if tool.function.name == name)), "tools")


def required_constraint(tools: list[Tool], parallel: bool) -> Constraint:
    """A list of calls; one call when they may not be parallel."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "parameters": _moved(_part(_parameters(tool)), f"#/items/anyOf/{index}/properties/parameters"),
            },
            "required": ["name", "parameters"],
            "additionalProperties": False,
        }
        for index, tool in enumerate(tools)
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    return schema_constraint(schema, "tools")


def _parameters(tool: Tool) -> dict[str, Any]:
    """Arguments are always an object, also where the schema leaves that open."""
    if tool.function.parameters is None:
        return _NO_ARGUMENTS
    return {"type": "object", **tool.function.parameters}


def _part(schema: dict[str, Any]) -> dict[str, Any]:
    """Without an id of its own, which would make it a document, that references to its parts don't leave."""
    return {name: value for name, value in schema.items() if name != "$id"}


def _moved(schema: Any, place: str) -> Any:
    """The schema with references to its own parts, now that it is itself a part of another."""
    if isinstance(schema, list):
        return [_moved(item, place) for item in schema]
    if not isinstance(schema, dict):
        return schema
    moved = {name: _moved(value, place) for name, value in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#"):
        moved["$ref"] = place + reference[1:]
    return moved
