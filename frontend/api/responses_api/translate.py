"""A request to /v1/responses as a chat request: what both have stays as it is, the rest changes its name and shape."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from baton.frontend.api.errors import ApiError, bad_request, renamed
from baton.frontend.api.requests import ChatCompletionRequest, Refusals, refuse
from baton.frontend.api.responses_api.items import to_messages
from baton.frontend.api.responses_api.requests import (
    FunctionTool,
    InputItem,
    ResponsesRequest,
    TextFormat,
    ToolChoiceObject,
)
from baton.frontend.api.run import NO_PLACE

LOGPROBS = "message.output_text.logprobs"
INCLUDABLE = frozenset(
    {
        LOGPROBS,
        "reasoning.encrypted_content",
        "message.input_image.image_url",
        "file_search_call.results",
        "web_search_call.results",
        "web_search_call.action.sources",
        "code_interpreter_call.outputs",
        "computer_call_output.output.image_url",
    }
)
"""Of these the log probabilities alone add something: reasoning is given in plain text, built-in tools never run."""

_REFUSED: Refusals = {
    "background_options": ((None, {}), "background answers have no options"),
    "context_management": ((None, []), "what does not fit is an error; send less"),
    "conversation": ((None,), "use previous_response_id"),
    "moderation": ((None,), "the server moderates nothing"),
    "prompt": ((None,), "the server stores no prompts; send instructions and input"),
}

_OWN = frozenset({"stream", "stream_options", "n", "tools", "tool_choice", "response_format", "top_logprobs"})
_SHARED = frozenset(ResponsesRequest.__struct_fields__) & frozenset(ChatCompletionRequest.__struct_fields__) - _OWN
"""Fields that mean the same to both: the model and how to sample."""

_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "max_tokens": "max_output_tokens",
    "response_format": "text.format",
}


def check(request: ResponsesRequest, raw: dict[str, Any]) -> None:
    """Refuse what has no chat request. Raises ApiError naming the field."""
    refuse(raw, {**NO_PLACE, **_REFUSED})
    for value in request.include or ():
        if value not in INCLUDABLE:
            raise bad_request(f"include has {value[:64]!r}; possible are {', '.join(sorted(INCLUDABLE))}.", "include")
    if request.truncation not in (None, "auto", "disabled"):
        raise bad_request("truncation must be auto or disabled.", "truncation")
    if request.background and not request.store:
        raise bad_request("background needs store to be true: there is no other way to the response.", "background")


def to_chat(request: ResponsesRequest, raw: dict[str, Any], items: Sequence[InputItem]) -> dict[str, Any]:
    """The body of a chat request for `items`, which are what was said before and the input. Raises ApiError."""
    messages = to_messages(items)
    if request.instructions:
        messages = [{"role": "system", "content": request.instructions}, *messages]
    chat = {name: value for name, value in raw.items() if name in _SHARED}
    chat["messages"] = messages
    chat["max_completion_tokens"] = request.max_output_tokens
    chat |= _tools(request.tools or [], request.tool_choice)
    if request.text is not None and request.text.format is not None:
        chat["response_format"] = _response_format(request.text.format)
    if request.reasoning is not None and request.reasoning.effort is not None:
        chat["reasoning_effort"] = request.reasoning.effort
    if LOGPROBS in (request.include or ()):
        chat |= {"logprobs": True, "top_logprobs": request.top_logprobs or 0}
    return chat


def in_our_names(error: ApiError) -> ApiError:
    """An error about a chat request, told in the names of this API."""
    return renamed(error, _NAMES)


def _tools(tools: list[FunctionTool], choice: str | ToolChoiceObject | None) -> dict[str, Any]:
    for index, tool in enumerate(tools):
        if tool.type != "function":
            raise bad_request(
                f"tools[{index}] is of type {tool.type[:64]!r}: this server has no built-in tools, only functions.",
                f"tools[{index}].type",
                "unsupported",
            )
        if not tool.name:
            raise bad_request(f"tools[{index}] has no name.", f"tools[{index}].name")
    chosen: Any = choice
    if isinstance(choice, ToolChoiceObject):
        tools, chosen = _choose(tools, choice)
    chat: dict[str, Any] = {"tools": [_tool(tool) for tool in tools]} if tools else {}
    return chat if chosen is None else {**chat, "tool_choice": chosen}


def _choose(tools: list[FunctionTool], choice: ToolChoiceObject) -> tuple[list[FunctionTool], Any]:
    match choice.type:
        case "function" if choice.name:
            return tools, {"type": "function", "function": {"name": choice.name}}
        case "allowed_tools" if choice.mode in ("auto", "required") and choice.tools:
            names = {tool.name for tool in choice.tools}
            allowed = [tool for tool in tools if tool.name in names]
            if len(allowed) < len(names):
                raise bad_request("tool_choice allows a tool that is not among tools.", "tool_choice")
            return allowed, choice.mode
    raise bad_request(
        "tool_choice must be none, auto, required, {type: function, name} or {type: allowed_tools, mode, tools}.",
        "tool_choice",
    )


def _tool(tool: FunctionTool) -> dict[str, Any]:
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {
        "type": "function",
        "function": {name: value for name, value in function.items() if value not in (UNSET, None)},
    }


def _response_format(format: TextFormat) -> dict[str, Any]:
    if format.type != "json_schema":
        return {"type": format.type}
    if format.schema is UNSET or format.name is UNSET:
        raise bad_request("text.format of type json_schema needs the fields name and schema.", "text.format")
    given = msgspec.to_builtins(format)
    del given["type"]
    return {"type": "json_schema", "json_schema": given}
