"""The answers of the endpoints that turn texts into vectors and compare them."""

from typing import Literal

from msgspec import UNSET, UnsetType

from baton.frontend.api.responses import PromptTokensDetails, Response
from baton.proto.messages import Ledger


class PooledUsage(Response):
    """Tokens of a request that has no output tokens."""

    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptTokensDetails | None = None


class _List(Response, kw_only=True):
    id: str
    created: int
    model: str
    usage: PooledUsage
    baton_ledger: list[Ledger] | UnsetType = UNSET
    """With the header `x-baton-ledger: 1`: what was done for each input."""


class Embedding(Response, kw_only=True):
    """The vector of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingList(_List, kw_only=True):
    """Answer to /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]


class Score(Response, kw_only=True):
    """How alike the texts of one pair are, from -1 to 1."""

    object: Literal["score"] = "score"
    index: int
    score: float


class ScoreList(_List, kw_only=True):
    """Answer to /v1/score."""

    object: Literal["list"] = "list"
    data: list[Score]


class RerankDocument(Response):
    """As it was given."""

    text: str


class RerankResult(Response, kw_only=True):
    """One document."""

    index: int
    """Its place in the request."""
    document: RerankDocument | UnsetType = UNSET
    relevance_score: float


class RerankList(_List, kw_only=True):
    """Answer to /v1/rerank; the best first."""

    results: list[RerankResult]
