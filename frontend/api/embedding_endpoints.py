"""/v1/embeddings, /v1/score and /v1/rerank over HTTP."""

import time
from collections.abc import Awaitable, Callable

from baton.frontend.api.embedding_requests import EmbeddingRequest, RerankRequest, ScoreRequest
from baton.frontend.api.embedding_responses import EmbeddingList, RerankList, ScoreList
from baton.frontend.api.embeddings import Embedder
from baton.frontend.api.requests import R
from baton.frontend.http_io import Receive, Scope, Send, answer_or_disconnect, wants_ledger
from baton.frontend.openapi import Operation
from baton.frontend.reading import RequestReader

SCORE_PATHS = ("/v1/score", "/score")
RERANK_PATHS = ("/v1/rerank", "/v2/rerank", "/rerank")
"""vLLM's; /v1 is Jina's path and /v2 Cohere's."""


class EmbeddingsApi:
    """The endpoints."""

    def __init__(self, reader: RequestReader, embedder: Embedder) -> None:
        self._reader = reader
        self._embedder = embedder

    def operations(self) -> dict[str, Operation]:
        """By path."""
        return {
            "/v1/embeddings": Operation(self.embeddings, EmbeddingRequest, EmbeddingList),
            **dict.fromkeys(SCORE_PATHS, Operation(self.score, ScoreRequest, ScoreList)),
            **dict.fromkeys(RERANK_PATHS, Operation(self.rerank, RerankRequest, RerankList)),
        }

    async def embeddings(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A vector for each input."""
        await self._answer(EmbeddingRequest, self._embedder.embeddings, scope, receive, send)

    async def score(self, scope: Scope, receive: Receive, send: Send) -> None:
        """How alike the texts of each pair are."""
        await self._answer(ScoreRequest, self._embedder.score, scope, receive, send)

    async def rerank(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Documents in the order of their likeness to a query."""
        await self._answer(RerankRequest, self._embedder.rerank, scope, receive, send)

    async def _answer(
        self, kind: type[R], answers: Callable[..., Awaitable[bytes]], scope: Scope, receive: Receive, send: Send
    ) -> None:
        received_s = time.monotonic()
        wanted, _raw = await self._reader.read(kind, scope, receive)
        with_ledger = wants_ledger(scope)
        work = answers(wanted, with_ledger=with_ledger, received_s=received_s)
        answer = await answer_or_disconnect(work, receive)
        await answer(scope, receive, send)
