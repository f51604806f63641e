"""Offline embeddings and scores; the interface is vLLM's where the meaning is the same."""

from collections.abc import Sequence
from typing import Any

import msgspec

from baton.frontend.api.embedding_requests import EmbeddingRequest, ScoreRequest
from baton.frontend.api.embeddings import (
    Pooled,
    PoolingWishes,
    pair_scores,
    pooling_params,
    read_inputs,
    read_pairs,
    read_wishes,
    take_vector,
)
from baton.frontend.api.inputs import PoolingRequest, prompts_of, read_cut
from baton.frontend.api.prompts import Prompt
from baton.frontend.instructions import Finished
from baton.frontend.model_info import ModelInfo
from baton.frontend.pooling import PoolingInfo
from baton.frontend.tokenizer import Tokenizer
from baton.proto.lifecycle import FinishReason, Outcome
from baton.proto.messages import Ledger, Sid


class PoolingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How prompts become vectors. None is the checkpoint's or the LLM's default."""

    dimensions: int | None = None
    """Vectors are cut to so many, where the model was trained for it."""
    normalize: bool | None = None
    truncate_prompt_tokens: int | None = None
    """Longer prompts are cut to so many tokens, -1: to what the model takes; None: they are an error."""
    truncation_side: str | None = None
    """left or right: which end is cut off."""
    add_special_tokens: bool | None = None


class EmbeddingOutput(msgspec.Struct):
    """One vector."""

    embedding: list[float]


class EmbeddingRequestOutput(msgspec.Struct):
    """What became of one prompt."""

    outputs: EmbeddingOutput
    prompt_token_ids: list[int]
    num_cached_tokens: int
    ledger: Ledger
    """What was computed and when."""
    finished: bool = True


class ScoringOutput(msgspec.Struct):
    """Cosine similarity of a pair, from -1 to 1."""

    score: float


class ScoringRequestOutput(msgspec.Struct):
    """What became of one pair."""

    outputs: ScoringOutput
    prompt_token_ids: list[int]
    """Of both texts, one after the other."""
    finished: bool = True


class OfflinePooling:
    """Vectors from an engine in this process. Methods raise ApiError for bad arguments."""

    def __init__(self, engine: Any, tokenizer: Tokenizer, info: ModelInfo, pooling: PoolingInfo) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._info = info
        self._pooling = pooling
        self._next_sid = 0

    def embed(self, prompts: Any, params: PoolingParams) -> list[EmbeddingRequestOutput]:
        """See LLM.embed."""
        request = msgspec.convert({"input": prompts, **msgspec.structs.asdict(params)}, EmbeddingRequest)
        wishes = read_wishes(request, self._pooling)
        tokenised = self._prompts(request, read_inputs(request.input), "prompts")
        return [
            EmbeddingRequestOutput(
                EmbeddingOutput(pooled.vector.tolist()),
                prompt.ids.tolist(),
                min(pooled.ledger.cached_tokens, len(prompt.ids)),
                pooled.ledger,
            )
            for prompt, pooled in zip(tokenised, self._run(tokenised, wishes), strict=True)
        ]

    def score(self, data_1: Any, data_2: Any, params: PoolingParams) -> list[ScoringRequestOutput]:
        """See LLM.score."""
        fields = msgspec.structs.asdict(params) | {"data_1": data_1, "data_2": data_2}
        request = msgspec.convert(fields, ScoreRequest)
        one, other, _ = read_pairs(request)
        if not (one and other):
            raise ValueError("score needs at least one text on each side")
        tokenised = [*self._prompts(request, one, "data_1"), *self._prompts(request, other, "data_2")]
        pooled = self._run(tokenised, PoolingWishes())
        ones, others = tokenised[: len(one)], tokenised[len(one) :]
        return [
            ScoringRequestOutput(ScoringOutput(score), [*ones[index % len(ones)].ids.tolist(), *second.ids.tolist()])
            for index, (score, second) in enumerate(
                zip(pair_scores([each.vector for each in pooled], len(one)), others, strict=True)
            )
        ]

    def _prompts(self, request: PoolingRequest, inputs: Sequence[Any], param: str) -> list[Prompt]:
        return prompts_of(inputs, read_cut(request, self._info), self._tokenizer, self._info, param)

    def _run(self, prompts: list[Prompt], wishes: PoolingWishes) -> list[Pooled]:
        """All at once; what is left is aborted when one fails."""
        params = pooling_params(self._pooling)
        indices: dict[Sid, int] = {}
        results: dict[int, Pooled] = {}
        for index, prompt in enumerate(prompts):
            self._next_sid += 1
            indices[1, self._next_sid] = index
            self._engine.add((1, self._next_sid), params, prompt.ids)
        try:
            while indices:
                for row in self._engine.step():
                    if row.finish.reason == FinishReason.ERROR:
                        raise RuntimeError(row.finish.message or "the engine failed")
                    finished = Finished(row.sid, Outcome.STOP, row.ledger or Ledger(), 0, vector=row.vector)
                    results[indices.pop(row.sid)] = take_vector(finished, wishes)
        finally:
            for sid in indices:
                self._engine.abort(sid)
        return [results[index] for index in range(len(prompts))]
