"""What clients send to /v1/responses. Names and types are OpenAI's; sampling parameters beyond it are vLLM's."""

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import UNSET, Meta, UnsetType

from baton.frontend.api.requests import NO_PLACE, GenerationFields, Refusals
from baton.frontend.structured.constraint import Schema

_REFUSED: Refusals = {
    **NO_PLACE,
    "background_options": ((None, {}), "background answers have no options"),
    "context_management": ((None, []), "what does not fit is an error; send less"),
    "conversation": ((None,), "use previous_response_id"),
    "moderation": ((None,), "the server moderates nothing"),
    "prompt": ((None,), "the server stores no prompts; send instructions and input"),
}


class InputPart(msgspec.Struct, kw_only=True):
    """A piece of an item's content; only text is understood."""

    type: str
    text: str | UnsetType = UNSET
    refusal: str | UnsetType = UNSET
    annotations: list[Any] | UnsetType = UNSET


class InputItem(msgspec.Struct, kw_only=True):
    """A message, a reasoning, a function's call or its output, as the type says; no type means a message."""

    type: str = ""
    id: str | None = None
    status: str | UnsetType | None = UNSET
    role: str | UnsetType = UNSET
    content: str | list[InputPart] | UnsetType | None = UNSET
    summary: list[InputPart] | UnsetType = UNSET
    call_id: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    output: str | list[InputPart] | UnsetType = UNSET


class TextFormat(msgspec.Struct, kw_only=True):
    """The form of the answer's text. It is always held to a schema, whatever `strict` says."""

    type: Annotated[str, Meta(description="text, json_object or json_schema")]
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    schema: Schema | UnsetType = UNSET
    strict: bool | UnsetType | None = UNSET


class TextConfig(msgspec.Struct, kw_only=True):
    """About the text of the answer."""

    format: TextFormat | None = None
    verbosity: str | UnsetType | None = UNSET


class ReasoningConfig(msgspec.Struct, kw_only=True):
    """About the reasoning. `effort` goes to the chat template, as `reasoning_effort`."""

    effort: str | None = None
    summary: Annotated[str | None, Meta(description="ignored: reasoning is given in full")] = None


class FunctionTool(msgspec.Struct, kw_only=True):
    """Only functions are known."""

    type: str
    name: str | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    parameters: dict[str, Any] | UnsetType | None = UNSET
    strict: bool | UnsetType | None = UNSET


class ToolChoiceObject(msgspec.Struct, kw_only=True):
    """One function that must be called, or those that may be."""

    type: Annotated[str, Meta(description="function or allowed_tools")]
    name: str | UnsetType = UNSET
    mode: str | UnsetType = UNSET
    tools: list[FunctionTool] | UnsetType = UNSET


class ResponsesRequest(GenerationFields, kw_only=True):
    """POST /v1/responses"""

    refused: ClassVar[Refusals] = _REFUSED
    input: str | list[InputItem]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool = True
    background: bool = False
    max_output_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_tool_calls: Annotated[int | None, Meta(description="of built-in tools, of which there are none")] = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Annotated[
        str | ToolChoiceObject | None, Meta(description="none, auto, required, a function or allowed_tools")
    ] = None
    parallel_tool_calls: bool = True
    include: list[str] | None = None
    top_logprobs: int | None = None
    truncation: Annotated[str | None, Meta(description="disabled, or auto: oldest turns are left out")] = None
    metadata: Annotated[dict[str, str], Meta(max_length=16)] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
