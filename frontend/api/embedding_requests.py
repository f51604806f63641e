"""The requests of the endpoints that turn texts into vectors and compare them. Names and defaults are OpenAI's, vLLM's,
and for reranking Jina's and Cohere's."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from baton.frontend.api.requests import Ids


class _Pooled(msgspec.Struct, kw_only=True):
    """What all of them take. None is the server's default."""

    model: str | None = None
    truncate_prompt_tokens: Annotated[
        int | None, Meta(description="Longer inputs are cut to so many tokens; -1: to what the model takes")
    ] = None
    truncation_side: Annotated[
        Literal["left", "right"] | None, Meta(description="Which end is cut off; default: right")
    ] = None
    add_special_tokens: bool | None = None
    priority: int = 0
    cache_salt: str | None = None
    user: str | None = None


class EmbeddingRequest(_Pooled, kw_only=True):
    """POST /v1/embeddings"""

    input: str | list[str | int | Ids]
    encoding_format: Annotated[
        Literal["float", "base64"] | None, Meta(description="base64: of little-endian float32")
    ] = None
    dimensions: int | None = None
    normalize: bool | None = None
    use_activation: Annotated[bool | None, Meta(description="vLLM's name of normalize")] = None
    embed_dtype: Literal["float32"] | None = None
    endianness: Literal["native", "little"] | None = None


class ScoreRequest(_Pooled, kw_only=True):
    """POST /v1/score, with text_1 and text_2, or the same under one of vLLM's other pairs of names"""

    text_1: str | list[str] | None = None
    text_2: str | list[str] | None = None
    data_1: str | list[str] | None = None
    data_2: str | list[str] | None = None
    queries: str | list[str] | None = None
    documents: str | list[str] | None = None


class Document(msgspec.Struct):
    """A text."""

    text: str


class RerankRequest(_Pooled, kw_only=True):
    """POST /v1/rerank"""

    query: str
    documents: list[str | Document]
    top_n: Annotated[int | None, Meta(description="How many to return, the best first; default: all")] = None
    return_documents: bool = True
