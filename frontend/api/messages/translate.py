"""A request to /v1/messages as a chat request."""

from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec import UNSET

from baton.frontend.api.errors import ApiError, bad_request, renamed
from baton.frontend.api.messages.requests import (
    ContentBlock,
    CountTokensRequest,
    InputMessage,
    MessagesRequest,
    MessageTool,
    MessageToolChoice,
    Thinking,
)
from baton.frontend.api.requests import ChatCompletionRequest

Placed = tuple[str, ContentBlock]
"""A block and where it stands in the request."""
_OWN = frozenset({"messages", "stream", "stream_options", "n", "tools", "tool_choice", "max_tokens", "response_format"})
_SHARED = frozenset(MessagesRequest.__struct_fields__) & frozenset(ChatCompletionRequest.__struct_fields__) - _OWN
"""Fields that mean the same to both: the model and how to sample."""

_NAMES = {"max_completion_tokens": "max_tokens", "response_format": "output_config.format", "stop": "stop_sequences"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}
Messages = list[dict[str, Any]]


def to_chat(request: MessagesRequest | CountTokensRequest, raw: dict[str, Any]) -> dict[str, Any]:
    """The body of a chat request. Raises ApiError naming the field."""
    chat = {name: value for name, value in raw.items() if name in _SHARED}
    chat["messages"] = _messages(request)
    chat |= _continued(request.messages[-1])
    chat |= _tools(request.tools or [], request.tool_choice)
    if isinstance(request, MessagesRequest):
        chat["max_completion_tokens"] = request.max_tokens
        if request.stop_sequences is not None:
            chat["stop"] = request.stop_sequences
    variables: dict[str, Any] = {}
    if request.thinking is not None:
        variables["enable_thinking"] = request.thinking.type != "disabled"
        chat["include_reasoning"] = _shows(request.thinking)
    if request.output_config is not None:
        if request.output_config.effort is not None:
            variables["reasoning_effort"] = request.output_config.effort
        if request.output_config.format is not None:
            schema = {"name": "output", "schema": request.output_config.format.schema}
            chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    if variables:
        chat["chat_template_kwargs"] = {**variables, **(request.chat_template_kwargs or {})}
    return chat


def in_our_names(error: ApiError) -> ApiError:
    """An error about a chat request, told in the names of this API."""
    return renamed(error, _NAMES)


def _shows(thinking: Thinking) -> bool:
    if thinking.type not in ("enabled", "adaptive", "disabled"):
        raise bad_request("thinking.type must be enabled, adaptive or disabled.", "thinking.type")
    return thinking.type != "disabled" and thinking.display != "omitted"


def _continued(last: InputMessage) -> dict[str, Any]:
    """An assistant's text at the end is the beginning of the answer."""
    if last.role != "assistant":
        return {}
    if isinstance(last.content, list) and any(block.type == "tool_use" for block in last.content):
        raise bad_request("the last message has a tool_use without a tool_result after it.", "messages")
    return {"continue_final_message": True, "add_generation_prompt": False}


def _messages(request: MessagesRequest | CountTokensRequest) -> Messages:
    if not request.messages:
        raise bad_request("messages must not be empty.", "messages")
    messages: Messages = []
    if request.system:
        messages.append({"role": "system", "content": _text(request.system, "system")})
    for role, blocks in _turns(request.messages):
        messages += [_of_assistant(blocks)] if role == "assistant" else _of_user(role, blocks)
    return messages


def _turns(messages: Sequence[InputMessage]) -> list[tuple[str, list[Placed]]]:
    """Roles with their blocks. Messages of one role in a row are one turn, as many templates demand."""
    turns: list[tuple[str, list[Placed]]] = []
    for index, message in enumerate(messages):
        where = f"messages[{index}].content"
        if isinstance(message.content, str):
            blocks = [(where, ContentBlock(type="text", text=message.content))]
        else:
            blocks = [(f"{where}[{i}]", block) for i, block in enumerate(message.content)]
        if turns and turns[-1][0] == message.role:
            turns[-1][1].extend(blocks)
        else:
            turns.append((message.role, blocks))
    return turns


def _of_assistant(blocks: Sequence[Placed]) -> dict[str, Any]:
    text, thinking = "", ""
    calls: list[dict[str, Any]] = []
    for place, block in blocks:
        match block.type:
            case "text":
                text += _text([block], place)
            case "thinking":
                thinking += block.thinking or ""
            case "redacted_thinking":
                pass
            case "tool_use":
                if block.id is UNSET or block.name is UNSET or block.input is UNSET:
                    raise bad_request(f"{place} of type tool_use needs id, name and input.", place)
                function = {"name": block.name, "arguments": msgspec.json.encode(block.input).decode()}
                calls.append({"id": block.id, "type": "function", "function": function})
            case _:
                raise _unsupported(block, place)
    message: dict[str, Any] = {"role": "assistant", "content": text or (None if calls else "")}
    if thinking:
        message |= {"reasoning": thinking, "reasoning_content": thinking}
    return message | ({"tool_calls": calls} if calls else {})


def _of_user(role: str, blocks: Sequence[Placed]) -> Messages:
    """Results of tools are messages of their own, and come before what the user says."""
    results: Messages = []
    said: list[dict[str, Any]] = []
    for place, block in blocks:
        if block.type == "tool_result":
            if block.tool_use_id is UNSET:
                raise bad_request(f"{place} of type tool_result needs tool_use_id.", place)
            content = _text(block.content or "", f"{place}.content")
            results.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": content})
        else:
            said.append({"type": "text", "text": _text([block], place)})
    if len(said) == 1:
        return [*results, {"role": role, "content": said[0]["text"]}]
    return [*results, {"role": role, "content": said}] if said else results


def _text(content: str | Sequence[ContentBlock], where: str) -> str:
    """Blocks of text, one after the other, each on lines of its own."""
    if isinstance(content, str):
        return content
    for block in content:
        if block.type != "text" or block.text is UNSET:
            raise _unsupported(block, where)
    return "\n".join(block.text for block in content if block.text)


def _unsupported(block: ContentBlock, where: str) -> ApiError:
    return bad_request(
        f"{where} has a block of type {block.type[:64]!r}; this model takes text, and tools of the client's.",
        where,
        "unsupported",
    )


def _tools(tools: Sequence[MessageTool], choice: MessageToolChoice | None) -> dict[str, Any]:
    for index, tool in enumerate(tools):
        if tool.type not in (None, "custom") or tool.input_schema is UNSET:
            raise bad_request(
                f"tools[{index}] must be a tool of the client's, with an input_schema: the server has none.",
                f"tools[{index}]",
                "unsupported",
            )
    chat: dict[str, Any] = {"tools": [_tool(tool) for tool in tools]} if tools else {}
    if choice is None:
        return chat
    if choice.type == "tool":
        if not choice.name:
            raise bad_request("tool_choice of type tool needs a name.", "tool_choice.name")
        chat["tool_choice"] = {"type": "function", "function": {"name": choice.name}}
    else:
        chat["tool_choice"] = _CHOICES[choice.type]
    return chat | {"parallel_tool_calls": not choice.disable_parallel_tool_use}


def _tool(tool: MessageTool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.input_schema}
    if tool.description is not None:
        function["description"] = tool.description
    return {"type": "function", "function": function}
