"""What /v1/messages sends: the message, its blocks and its events."""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from baton.frontend.api.messages.errors import MessagesError
from baton.frontend.api.responses import Response
from baton.proto.messages import Ledger

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]


class TextBlock(Response, tag_field="type", tag="text"):
    """What the model says to the user."""

    text: str


class ThinkingBlock(Response, tag_field="type", tag="thinking"):
    """What the model says to itself. Nothing signs it, and nothing asks for a signature when it comes back."""

    thinking: str
    signature: str = ""


class ToolUseBlock(Response, tag_field="type", tag="tool_use"):
    """A tool that the client is to use."""

    id: str
    name: str
    input: Any


Block = TextBlock | ThinkingBlock | ToolUseBlock


class OutputTokensDetails(Response):
    """What output tokens were spent on."""

    thinking_tokens: int


class MessageUsage(Response, kw_only=True):
    """Tokens of a message. Input tokens that came from the prefix cache are counted apart."""

    input_tokens: int
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class Message(Response, kw_only=True, tag_field="type", tag="message"):
    """Answer to /v1/messages."""

    id: str
    role: Literal["assistant"] = "assistant"
    content: list[Block]
    model: str
    stop_reason: StopReason | None = None
    stop_sequence: str | None = None
    stop_details: None = None
    """Of refusals, which there are none of."""
    usage: MessageUsage
    baton_ledger: Ledger | UnsetType = UNSET
    """With the header `x-baton-ledger: 1`: what was done for the request."""


class TokenCount(Response):
    """Answer to /v1/messages/count_tokens."""

    input_tokens: int


class MessageStart(msgspec.Struct, tag_field="type", tag="message_start"):
    """A message that is empty yet. What came from the cache is told at the end."""

    message: Message


class BlockStart(msgspec.Struct, tag_field="type", tag="content_block_start"):
    """A block that is empty yet."""

    index: int
    content_block: Block


class TextDelta(msgspec.Struct, tag_field="type", tag="text_delta"):
    """More text."""

    text: str


class ThinkingDelta(msgspec.Struct, tag_field="type", tag="thinking_delta"):
    """More thinking."""

    thinking: str


class InputJsonDelta(msgspec.Struct, tag_field="type", tag="input_json_delta"):
    """More of a tool's input."""

    partial_json: str


class BlockDelta(msgspec.Struct, tag_field="type", tag="content_block_delta"):
    """More of a block."""

    index: int
    delta: TextDelta | ThinkingDelta | InputJsonDelta


class BlockStop(msgspec.Struct, tag_field="type", tag="content_block_stop"):
    """The block is complete."""

    index: int


class StopDelta(msgspec.Struct):
    """Why the message ends."""

    stop_reason: StopReason
    stop_sequence: str | None
    stop_details: None = None


class MessageDelta(msgspec.Struct, tag_field="type", tag="message_delta"):
    """What is known at the end; the usage is of the whole message."""

    delta: StopDelta
    usage: MessageUsage
    baton_ledger: Ledger | UnsetType = UNSET


class MessageStop(msgspec.Struct, tag_field="type", tag="message_stop"):
    """The last event."""


MessageEvent = MessageStart | BlockStart | BlockDelta | BlockStop | MessageDelta | MessageStop | MessagesError
