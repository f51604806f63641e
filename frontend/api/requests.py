"""The requests of the HTTP API. Names, types and defaults are OpenAI's and vLLM's."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, inspect

from baton.frontend.api.errors import bad_request
from baton.frontend.structured.constraint import ResponseFormat, Schema, StructuredOutputs
from baton.frontend.tools.request import Tool, ToolChoice

Ids = list[int]


class StreamOptions(msgspec.Struct, frozen=True):
    """Extras of a streamed answer."""

    include_usage: bool | None = False
    """A last chunk with the usage."""
    continuous_usage_stats: bool | None = False
    """The usage so far in every chunk."""


class GenerationFields(msgspec.Struct, kw_only=True):
    """What all generating endpoints take. None is the model's or the server's default."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Annotated[int | None, Meta(description="0 or -1: off")] = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: Ids | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[str, float] | None = None
    priority: int = 0
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int | None, Meta(description="-1: as many as fit")] = None
    truncation_side: Literal["left", "right"] | None = None
    prompt_logprobs: int | None = None
    logprob_token_ids: Ids | None = None
    allowed_token_ids: Ids | None = None
    bad_words: list[str] | None = None
    echo: bool = False
    best_of: Annotated[int | None, Meta(description="no more than n")] = None
    use_beam_search: Annotated[bool, Meta(description="with n beams")] = False
    length_penalty: float = 1.0
    cache_salt: str | None = None
    request_id: str | None = None
    user: str | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: str | Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None


class CompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/completions"""

    prompt: str | list[str | int | Ids]
    max_tokens: int | None = 16
    logprobs: int | None = None


class ContentPart(msgspec.Struct):
    """A piece of a message; only text is understood."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One turn. What else it carries (name, tool_calls, …) goes to the chat template unread."""

    role: str
    content: str | list[ContentPart] | None = None


class ChatCompletionRequest(GenerationFields, kw_only=True):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage]
    max_tokens: Annotated[int | None, Meta(description="deprecated: max_completion_tokens")] = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]] | None, Meta(description="for the chat template")] = None
    reasoning_effort: Annotated[str | None, Meta(description="for the chat template; none: no thinking")] = None
    tools: list[Tool] | None = None
    tool_choice: Annotated[ToolChoice | None, Meta(description="none, auto, required or a tool's name")] = None
    parallel_tool_calls: bool = True
    include_reasoning: bool = True


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize, with `prompt` or `messages`"""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    tools: list[Tool] | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize"""

    tokens: Ids
    model: str | None = None


GenerationRequest = CompletionRequest | ChatCompletionRequest
R = TypeVar("R", bound=msgspec.Struct)

_IGNORED = frozenset({"store", "metadata", "service_tier", "safety_identifier", "prompt_cache_key"})
"""Fields that ask for nothing of the answer."""

Refusals = Mapping[str, tuple[tuple[Any, ...], str]]
"""Fields that would change the answer and are refused: values that ask for nothing, and why others are not served."""

_UNSUPPORTED: Refusals = {
    "audio": ((None,), "the model writes text"),
    "chat_template": (
        (None,),
        "a template is code: the server takes it from the model or --chat-template",
    ),
    "function_call": ((None, "none"), "use tool_choice"),
    "functions": ((None, []), "use tools"),
    "detokenize": ((None, True), "answers are text; with return_token_ids they are tokens too"),
    "kv_transfer_params": ((None,), "the server places prefill and decode itself"),
    "logits_processors": ((None, []), "the server runs no code of its clients"),
    "modalities": ((None, ["text"]), "the model writes text"),
    "prediction": ((None,), "the server has no speculation with a client's text"),
    "prompt_embeds": ((None,), "give text or token ids"),
    "repetition_detection": ((None,), "use repetition_penalty or frequency_penalty"),
    "suffix": ((None, ""), "the model continues a prompt and fills no gap"),
    "thinking_token_budget": ((None, -1), "max_completion_tokens bounds reasoning and answer together"),
    "watermarking": ((None, False), "outputs have no watermark"),
    "web_search_options": ((None,), "the server searches nothing"),
}


def parse(body: bytes, kind: type[R]) -> tuple[R, dict[str, Any], list[str]]:
    """The request, its JSON object as it came, and the names of fields that nobody knows. Raises ApiError."""
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise bad_request(f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise bad_request("the body is nested too deeply") from error
    if not isinstance(raw, dict):
        raise bad_request("the body must be a JSON object")
    request, unknown = read(raw, kind)
    return request, raw, unknown


def read(raw: dict[str, Any], kind: type[R]) -> tuple[R, list[str]]:
    """The request in an object of plain values, and the names of fields that nobody knows. Raises ApiError."""
    refuse(raw, _refused_of(kind))
    try:
        request = msgspec.convert(_settled(raw, kind), kind)
    except msgspec.ValidationError as error:
        message, _, where = str(error).partition(" - at `$")
        param = where.strip("`").lstrip(".") or None
        raise bad_request(f"{param}: {message}" if param else message, param=param) from error
    known = _known_names(kind)
    return request, [name for name in raw if name not in known]


def _settled(raw: dict[str, Any], kind: type) -> dict[str, Any]:
    """Clients send null for switches and counts that they do not set, and those with one kind of number 16.0 for 16."""
    unset, counts = switches(kind), _counts(kind)
    return {
        name: int(value) if isinstance(value, float) and value.is_integer() and name in counts else value
        for name, value in raw.items()
        if value is not None or name not in unset
    }


@cache
def _known_names(kind: type) -> frozenset[str]:
    """Fields that a client may send."""
    return frozenset({*_field_names(kind), *_UNSUPPORTED, *_IGNORED})


@cache
def _field_names(kind: type) -> frozenset[str]:
    return frozenset(field.name for field in msgspec.structs.fields(kind))


@cache
def switches(kind: type) -> frozenset[str]:
    """Fields whose default is False, True or a number; null means the same."""
    fields = msgspec.structs.fields(kind)
    return frozenset(field.name for field in fields if isinstance(field.default, bool | int | float))


@cache
def _counts(kind: type) -> frozenset[str]:
    """Fields that take whole numbers alone."""
    return frozenset(field.name for field in msgspec.structs.fields(kind) if _is_count(inspect.type_info(field.type)))


def _is_count(field: inspect.Type) -> bool:
    if isinstance(field, inspect.Metadata):
        return _is_count(field.type)
    kinds = {type(each) for each in (field.types if isinstance(field, inspect.UnionType) else (field,))}
    return inspect.IntType in kinds and inspect.FloatType not in kinds


@cache
def _refused_of(kind: type) -> Refusals:
    """What of _UNSUPPORTED is no field of this request."""
    return {name: why for name, why in _UNSUPPORTED.items() if name not in _field_names(kind)}


def refuse(raw: dict[str, Any], fields: Refusals) -> None:
    """Raises ApiError for a field that asks for what is not served."""
    for name, (harmless, why) in fields.items():
        if name in raw and raw[name] not in harmless:
            raise bad_request(f"`{name}` is not supported: {why}.", param=name, code="unsupported")
