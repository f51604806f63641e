"""What /v1/responses sends: the response, its items and its events. UNSET fields do not appear, None ones as null."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from baton.frontend.api.responses import Response, TokenLogprob
from baton.frontend.api.responses_api.requests import (
    FunctionTool,
    InputItem,
    ReasoningConfig,
    TextConfig,
    ToolChoiceObject,
)
from baton.proto.messages import Ledger

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]


class OutputText(Response, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    logprobs: list[TokenLogprob]
    annotations: tuple[()] = ()


class ReasoningText(Response, tag_field="type", tag="reasoning_text"):
    """The text of a reasoning."""

    text: str


class OutputMessage(Response, kw_only=True, tag_field="type", tag="message"):
    """What the model says to the user."""

    id: str
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]
    status: ItemStatus


class ReasoningItem(Response, kw_only=True, tag_field="type", tag="reasoning"):
    """What the model says to itself."""

    id: str
    summary: tuple[()] = ()
    """Reasoning is given in full."""
    content: list[ReasoningText]
    encrypted_content: str | None = None
    status: ItemStatus


class FunctionCall(Response, kw_only=True, tag_field="type", tag="function_call"):
    """A function that the client is to call."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = OutputMessage | ReasoningItem | FunctionCall


class InputTokensDetails(Response):
    """Where input tokens came from."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """Which nobody pays for here."""


class OutputTokensDetails(Response):
    """What output tokens were spent on."""

    reasoning_tokens: int


class ResponseUsage(Response):
    """Tokens of a response."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Response):
    """Why a response failed."""

    code: str
    message: str


class IncompleteDetails(Response):
    """Why a response is incomplete."""

    reason: Literal["max_output_tokens"]


class ResponsesResponse(Response, kw_only=True):
    """Answer to /v1/responses; what was asked for stands in it too."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    completed_at: int | None = None
    status: Status
    background: bool
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, str]
    model: str
    output: list[OutputItem]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: ReasoningConfig
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool
    temperature: float
    text: TextConfig
    tool_choice: str | ToolChoiceObject
    tools: list[FunctionTool]
    top_logprobs: int
    top_p: float
    truncation: str
    usage: ResponseUsage | None = None
    user: str | None
    baton_ledger: Ledger | UnsetType = UNSET
    """With the header `x-baton-ledger: 1`: what was done for the request."""


class ItemList(Response, kw_only=True):
    """Answer to /v1/responses/{id}/input_items."""

    object: Literal["list"] = "list"
    data: list[InputItem]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedResponse(Response, kw_only=True):
    """Answer to DELETE /v1/responses/{id}."""

    id: str
    object: Literal["response"] = "response"
    deleted: bool = True


class InputTokens(Response, kw_only=True):
    """Answer to /v1/responses/input_tokens."""

    object: Literal["response.input_tokens"] = "response.input_tokens"
    input_tokens: int


class Event(msgspec.Struct, tag_field="type"):
    """Base of what a streamed response consists of."""

    sequence_number: int


class _OfResponse(Event):
    response: ResponsesResponse


class Created(_OfResponse, tag="response.created"):
    """The first one."""


class Queued(_OfResponse, tag="response.queued"):
    """It waits, in the background."""


class InProgress(_OfResponse, tag="response.in_progress"):
    """Tokens come."""


class Completed(_OfResponse, tag="response.completed"):
    """The last one of a response that is complete."""


class Incomplete(_OfResponse, tag="response.incomplete"):
    """The last one of a response that has been cut off, or cancelled, as its status says."""


class Failed(_OfResponse, tag="response.failed"):
    """The last one of a response that the server could not complete."""


class _OfItem(Event):
    output_index: int
    item: OutputItem


class ItemAdded(_OfItem, tag="response.output_item.added"):
    """An item that is empty yet."""


class ItemDone(_OfItem, tag="response.output_item.done"):
    """The whole item."""


class _InItem(Event):
    item_id: str
    output_index: int


class _InPart(_InItem):
    content_index: int


class PartAdded(_InPart, tag="response.content_part.added"):
    """A part of an item that is empty yet."""

    part: OutputText | ReasoningText


class PartDone(_InPart, tag="response.content_part.done"):
    """The whole part."""

    part: OutputText | ReasoningText


class TextDelta(_InPart, tag="response.output_text.delta"):
    """More text."""

    delta: str
    logprobs: list[TokenLogprob]


class TextDone(_InPart, tag="response.output_text.done"):
    """The whole text."""

    text: str
    logprobs: list[TokenLogprob]


class ReasoningDelta(_InPart, tag="response.reasoning_text.delta"):
    """More reasoning."""

    delta: str


class ReasoningDone(_InPart, tag="response.reasoning_text.done"):
    """The whole reasoning."""

    text: str


class ArgumentsDelta(_InItem, tag="response.function_call_arguments.delta"):
    """More of a call's arguments."""

    delta: str


class ArgumentsDone(_InItem, tag="response.function_call_arguments.done"):
    """All of a call's arguments."""

    name: str
    arguments: str


StreamEvent = (
    Created
    | Queued
    | InProgress
    | Completed
    | Incomplete
    | Failed
    | ItemAdded
    | ItemDone
    | PartAdded
    | PartDone
    | TextDelta
    | TextDone
    | ReasoningDelta
    | ReasoningDone
    | ArgumentsDelta
    | ArgumentsDone
)
