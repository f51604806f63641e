"""What clients send to /v1/messages. Names and types are Anthropic's; sampling parameters beyond them are vLLM's."""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from baton.frontend.api.requests import NO_PLACE, GenerationFields, Refusals
from baton.frontend.structured.constraint import Schema

_REFUSED: Refusals = {
    **NO_PLACE,
    "container": ((None,), "the server runs no code"),
    "logprob_token_ids": ((None, []), "messages have no place for log-probabilities; /v1/chat/completions has"),
    "output_format": ((None,), "it has moved: send output_config.format"),
    "mcp_servers": ((None, []), "the server calls no tools; name them in tools and answer their calls"),
}


class ContentBlock(msgspec.Struct, kw_only=True):
    """A piece of a message, as its type says: text, thinking, tool_use or tool_result."""

    type: str
    text: str | UnsetType = UNSET
    thinking: str | UnsetType = UNSET
    id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    input: dict[str, Any] | UnsetType = UNSET
    tool_use_id: str | UnsetType = UNSET
    content: "str | list[ContentBlock] | UnsetType | None" = UNSET
    is_error: bool | UnsetType | None = UNSET


class InputMessage(msgspec.Struct, kw_only=True):
    """One turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[ContentBlock]


class MessageTool(msgspec.Struct, kw_only=True):
    """A tool of the client's; there are no others."""

    name: str
    description: str | None = None
    input_schema: dict[str, Any] | UnsetType = UNSET
    type: str | None = None


class MessageToolChoice(msgspec.Struct, kw_only=True):
    """Whether and which tools must be used."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | UnsetType = UNSET
    disable_parallel_tool_use: bool = False


class Thinking(msgspec.Struct, kw_only=True):
    """Whether the model is to think, as far as its chat template leaves the choice."""

    type: Annotated[str, Meta(description="enabled, adaptive or disabled")]
    budget_tokens: Annotated[int | None, Meta(description="not enforced; max_tokens is")] = None
    display: Annotated[str | None, Meta(description="summarized, or omitted: thinking is left out")] = None


class JsonFormat(msgspec.Struct, kw_only=True):
    """The schema of the answer's text, which is enforced."""

    type: Literal["json_schema"]
    schema: Schema


class OutputConfig(msgspec.Struct, kw_only=True):
    """About the answer."""

    effort: Annotated[str | None, Meta(description="goes to the chat template, as reasoning_effort")] = None
    format: JsonFormat | None = None


class _Conversation(GenerationFields, kw_only=True):
    """What stands before the answer."""

    refused: ClassVar[Refusals] = _REFUSED
    messages: list[InputMessage]
    system: str | list[ContentBlock] | None = None
    tools: list[MessageTool] | None = None
    tool_choice: MessageToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CountTokensRequest(_Conversation, kw_only=True):
    """POST /v1/messages/count_tokens"""


class MessagesRequest(_Conversation, kw_only=True):
    """POST /v1/messages"""

    max_tokens: Annotated[int, Meta(ge=1)]
    stop_sequences: list[str] | None = None
    metadata: dict[str, Any] | None = None
