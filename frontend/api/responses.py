"""The responses of the HTTP API. UNSET fields do not appear, None ones as null."""

from typing import Literal

import msgspec
from msgspec import UNSET, UnsetType

from baton.proto.messages import Ledger


class Response(msgspec.Struct):
    """Base of all responses."""


class PromptTokensDetails(Response):
    """Where prompt tokens came from."""

    cached_tokens: int


class CompletionTokensDetails(Response):
    """What output tokens were for."""

    reasoning_tokens: int


class Usage(Response):
    """Tokens of a request."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    """With a reasoning parser."""


class PromptLogprob(Response):
    """Of one token at one position of the prompt."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobsField = list[dict[str, PromptLogprob] | None] | None
"""Per prompt token: token id -> of itself and of the best ones; null for the first, which follows nothing."""


class CompletionLogprobs(Response):
    """One entry per token in each list."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt, which follows nothing."""
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Response):
    """One sample, or the part of it that a chunk carries."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobsField | UnsetType = UNSET
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class TopLogprob(Response):
    """A token that might have been chosen."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token that was chosen."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Response):
    """One entry per token."""

    content: list[TokenLogprob]


class CalledFunction(Response):
    """Which function, with which arguments; in chunks the name comes once and the arguments in pieces."""

    name: str | UnsetType = UNSET
    arguments: str = ""


class ToolCall(Response, kw_only=True):
    """A call, or in chunks a piece of it."""

    index: int | UnsetType = UNSET
    """In chunks: which call."""
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: CalledFunction


class ChatMessage(Response, kw_only=True):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    """null when there is nothing but calls or reasoning."""
    reasoning: str | None
    reasoning_content: str | None
    """The same, under its older name."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatDelta(Response):
    """A piece of the answer."""

    role: Literal["assistant"] | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class _ChatChoiceBase(Response, kw_only=True):
    index: int
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChoice(_ChatChoiceBase, kw_only=True):
    """One sample."""

    message: ChatMessage


class ChatChunkChoice(_ChatChoiceBase, kw_only=True):
    """A piece of one sample."""

    delta: ChatDelta


class _Envelope(Response, kw_only=True):
    id: str
    created: int
    model: str
    usage: Usage | UnsetType | None = UNSET
    baton_ledger: Ledger | list[Ledger] | UnsetType = UNSET
    """With the header `x-baton-ledger: 1`: what was done for the request, a list when it has several streams."""
    kv_transfer_params: UnsetType | None = UNSET
    """null in a whole answer, as where the engine itself moves KV blocks."""


class Completion(_Envelope, kw_only=True):
    """Answer to /v1/completions, or a chunk of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[CompletionChoice]


class ChatCompletion(_Envelope, kw_only=True):
    """Answer to /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]
    prompt_logprobs: PromptLogprobsField = None
    prompt_token_ids: list[int] | UnsetType = UNSET


class ChatChunk(_Envelope, kw_only=True):
    """Chunk of an answer to /v1/chat/completions."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(Response, kw_only=True):
    """A name under which the model is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "baton"
    root: str
    parent: str | None = None
    max_model_len: int


class ModelList(Response, kw_only=True):
    """Answer to /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenizeResponse(Response):
    """Answer to /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeResponse(Response):
    """Answer to /detokenize."""

    prompt: str


encode = msgspec.json.Encoder().encode
"""Any response as JSON."""
