"""Vectors of texts, and what is made of them: embeddings, scores of pairs, documents ranked by a query.

Each input is a stream without output tokens, whose end brings the pooled hidden state of its prompt.
"""

import asyncio
import base64
import secrets
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import msgspec
import numpy as np
from msgspec import UNSET

from baton.frontend.api import embedding_responses as responses
from baton.frontend.api.embedding_requests import Document, EmbeddingRequest, RerankRequest, ScoreRequest
from baton.frontend.api.errors import ApiError, bad_request, outcome_error, unavailable
from baton.frontend.api.inputs import PoolingRequest, check_count, prompts_of, read_cut
from baton.frontend.api.params import check_model
from baton.frontend.api.prompts import Prompt, Prompts
from baton.frontend.api.responses import PromptTokensDetails, encode
from baton.frontend.api.vectors import cosine, finish_vector
from baton.frontend.engine_client import EngineClient, OutputReader
from baton.frontend.instructions import Finished
from baton.frontend.model_info import ModelInfo
from baton.frontend.pooling import PoolingInfo
from baton.proto.lifecycle import RejectCode
from baton.proto.messages import Ledger, SamplingParams

IN_FLIGHT = 256
"""Streams of one request at a time: more keep no worker busier, and the queue is everybody's."""
MAX_ANSWER_BYTES = 64 * 2**20
"""Largest list of embeddings."""


@dataclass(frozen=True)
class PoolingWishes:
    """How pooled states become vectors."""

    dimensions: int | None = None
    """None: all."""
    normalize: bool = True


@dataclass(frozen=True)
class Pooled:
    """One input's result."""

    vector: np.ndarray
    """float32 [dimensions or hidden_size]."""
    ledger: Ledger


@dataclass(frozen=True)
class PoolingJob:
    """A request that has been checked and tokenised."""

    model: str
    prompts: list[Prompt]
    wishes: PoolingWishes
    priority: int
    with_ledger: bool
    received_s: float
    timeout_s: float = 0.0
    """Until the client's deadline; 0: none."""


class Embedder:
    """Runs pooling requests on the cluster."""

    def __init__(self, client: EngineClient, prompts: Prompts, info: ModelInfo, pooling: PoolingInfo) -> None:
        self._client = client
        self._prompts = prompts
        self._info = info
        self.pooling = pooling
        self.draining = False
        """New requests are refused: the server stops."""

    async def embeddings(self, request: EmbeddingRequest, *, with_ledger: bool, received_s: float) -> bytes:
        """Answer to /v1/embeddings. Raises ApiError."""
        job = await self.prepare(request, with_ledger=with_ledger, received_s=received_s)
        numbers = len(job.prompts) * (job.wishes.dimensions or self.pooling.hidden_size)
        check_answer_size(numbers, request.encoding_format == "base64")
        render = partial(_render, in_base64=request.encoding_format == "base64")
        rendered = await self.run(job, lambda index, pooled: (render(index, pooled.vector), pooled.ledger))
        head = _head(job, "embd", [ledger for _, ledger in rendered])
        # Rendered as they came: a thousand vectors at once would hold everybody up.
        data = cast(list[responses.Embedding], [part for part, _ in rendered])
        return encode(responses.EmbeddingList(**head, data=data))

    async def score(self, request: ScoreRequest, *, with_ledger: bool, received_s: float) -> bytes:
        """Answer to /v1/score. Raises ApiError."""
        one, other, names = read_pairs(request)
        inputs = [(one, names[0]), (other, names[1])]
        job = await self._prepare(request, inputs, PoolingWishes(), with_ledger=with_ledger, received_s=received_s)
        done = await self.run(job, _keep)
        scores = pair_scores([pooled.vector for pooled in done], len(one))
        data = [responses.Score(index=index, score=score) for index, score in enumerate(scores)]
        head = _head(job, "score", [pooled.ledger for pooled in done])
        return encode(responses.ScoreList(**head, data=data))

    async def rerank(self, request: RerankRequest, *, with_ledger: bool, received_s: float) -> bytes:
        """Answer to /v1/rerank. Raises ApiError."""
        texts = [each.text if isinstance(each, Document) else each for each in request.documents]
        if request.top_n is not None and request.top_n < 0:
            raise bad_request(f"top_n must be 0 (all) or more, got {request.top_n}.", "top_n")
        inputs = [([request.query], "query"), (texts, "documents")]
        job = await self._prepare(request, inputs, PoolingWishes(), with_ledger=with_ledger, received_s=received_s)
        done = await self.run(job, _keep)
        scores = pair_scores([pooled.vector for pooled in done], 1)
        best = sorted(range(len(texts)), key=lambda index: (-scores[index], index))[: request.top_n or None]
        results = [
            responses.RerankResult(
                index=index,
                document=responses.RerankDocument(texts[index]) if request.return_documents else UNSET,
                relevance_score=scores[index],
            )
            for index in best
        ]
        head = _head(job, "rerank", [pooled.ledger for pooled in done])
        return encode(responses.RerankList(**head, results=results))

    async def prepare(
        self, request: EmbeddingRequest, *, with_ledger: bool, received_s: float, timeout_s: float = 0.0
    ) -> PoolingJob:
        """Check and tokenise. Raises ApiError."""
        wishes = read_wishes(request, self.pooling)
        return await self._prepare(
            request,
            [(read_inputs(request.input), "input")],
            wishes,
            with_ledger=with_ledger,
            received_s=received_s,
            timeout_s=timeout_s,
        )

    async def _prepare(
        self,
        request: PoolingRequest,
        inputs: Sequence[tuple[Sequence[Any], str]],
        wishes: PoolingWishes,
        *,
        with_ledger: bool,
        received_s: float,
        timeout_s: float = 0.0,
    ) -> PoolingJob:
        """`inputs`: those of each field, and its name."""
        if self.draining:
            raise unavailable("the server is shutting down; send the request to another one")
        check_model(request.model, self._info)
        check_priority(request.priority)
        for each, param in inputs:
            check_count(len(each), param)
        check_count(sum(len(each) for each, _ in inputs), inputs[-1][1])
        cut = read_cut(request, self._info)

        def tokenise() -> list[Prompt]:
            tokenizer, info = self._prompts.tokenizer, self._info
            return [prompt for each, param in inputs for prompt in prompts_of(each, cut, tokenizer, info, param)]

        return PoolingJob(
            model=request.model or self._info.names[0],
            prompts=await self._prompts.in_thread(tokenise),
            wishes=wishes,
            priority=request.priority,
            with_ledger=with_ledger,
            received_s=received_s,
            timeout_s=timeout_s,
        )

    async def run(self, job: PoolingJob, use: Callable[[int, Pooled], Any]) -> list[Any]:
        """`use` of each input's index and result, as they come; in the order of the inputs. Raises ApiError."""
        results: list[Any] = [None] * len(job.prompts)
        params = pooling_params(self.pooling)
        waiting = deque(range(len(job.prompts)))
        sent: list[int] = []  # stream -> input

        async def submit(count: int) -> None:
            for _ in range(min(count, len(waiting))):
                sent.append(waiting.popleft())
                prompt = job.prompts[sent[-1]]
                reader.submit(prompt.ids, params, prompt.hashes, job.priority, job.timeout_s)
                await asyncio.sleep(0)  # in between others have their turns

        with OutputReader(self._client, job.received_s) as reader:
            await submit(IN_FLIGHT)
            while reader.num_open:
                for stream, output in (await reader.next()).items():
                    finished, index = output.finished, sent[stream]
                    assert finished is not None  # a stream without tokens has nothing but an end
                    if finished.reject_code == RejectCode.QUEUE_FULL and reader.num_open:
                        waiting.appendleft(index)  # behind streams of its own request: it goes again when one has ended
                        continue
                    results[index] = use(index, take_vector(finished, job.wishes))
                    await submit(1)
        return results


def read_inputs(given: str | list[Any]) -> list[Any]:
    """One string or list of ids, or several: always as several. Raises ApiError for a mixture of ids and others."""
    if isinstance(given, str):
        return [given]
    ids = sum(isinstance(item, int) for item in given)
    if ids and ids < len(given):
        raise bad_request("input mixes token ids with texts or lists; put the ids into lists of their own.", "input")
    return [given] if ids else given


def read_wishes(request: EmbeddingRequest, pooling: PoolingInfo) -> PoolingWishes:
    """Raises ApiError naming the field."""
    normalize = request.use_activation if request.normalize is None else request.normalize
    return PoolingWishes(
        check_dimensions(request.dimensions, pooling), pooling.normalize if normalize is None else normalize
    )


def check_dimensions(dimensions: int | None, pooling: PoolingInfo) -> int | None:
    """Vectors are cut only where the model was trained for it (Matryoshka). Raises ApiError."""
    if dimensions is None or dimensions == pooling.hidden_size:
        return None
    if pooling.matryoshka is None:
        raise bad_request(
            f"dimensions must be {pooling.hidden_size}, got {dimensions}: nothing says that this model was trained for "
            "vectors that are cut (matryoshka_dimensions in its config.json, or the server's --matryoshka-dimensions).",
            "dimensions",
        )
    if not 1 <= dimensions <= pooling.hidden_size or (pooling.matryoshka and dimensions not in pooling.matryoshka):
        possible = ", ".join(map(str, pooling.matryoshka)) or f"from 1 to {pooling.hidden_size}"
        raise bad_request(f"dimensions must be {possible}, got {dimensions}.", "dimensions")
    return dimensions


def check_answer_size(numbers: int, in_base64: bool) -> None:
    """Before the work is done for an answer that nobody could hold. Raises ApiError."""
    size = numbers * (6 if in_base64 else 22)
    if size > MAX_ANSWER_BYTES:
        raise bad_request(
            f"the answer would have {size / 2**20:.0f} MiB, at most {MAX_ANSWER_BYTES >> 20} are possible: send fewer "
            "inputs, or ask for encoding_format base64, which takes a quarter.",
            "input",
        )


def check_priority(priority: int) -> None:
    """Raises ApiError unless it fits into 32 bits."""
    if not -(2**31) <= priority < 2**31:
        raise bad_request(f"priority must be from {-(2**31)} to {2**31 - 1}, got {priority}.", "priority")


_PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"))


def read_pairs(request: ScoreRequest) -> tuple[list[str], list[str], tuple[str, str]]:
    """Both sides of the pairs and the names of their fields. Raises ApiError."""
    given = [names for names in _PAIRS if any(getattr(request, name) is not None for name in names)]
    if len(given) != 1:
        raise bad_request("give text_1 and text_2 (or data_1 and data_2, or queries and documents).", "text_1")
    names = given[0]
    for name in names:
        if getattr(request, name) is None:
            raise bad_request(f"{name} is missing.", name)
    one, other = ([each] if isinstance(each, str) else each for each in (getattr(request, name) for name in names))
    if one and other and len(one) not in (1, len(other)):
        raise bad_request(
            f"{names[0]} has {len(one)} texts and {names[1]} {len(other)}: give one and several, or as many of both.",
            names[0],
        )
    return one, other, names


def pair_scores(vectors: Sequence[np.ndarray], ones: int) -> list[float]:
    """Cosine of each of the first `ones` vectors with its partner among the others, or of the one with all of them."""
    one, other = vectors[:ones], vectors[ones:]
    return [cosine(one[index % len(one)], each) for index, each in enumerate(other)]


def pooling_params(pooling: PoolingInfo) -> SamplingParams:
    """What a worker is told."""
    return SamplingParams(max_tokens=0, temperature=0.0, pooling=pooling.pooling.value)


def take_vector(finished: Finished, wishes: PoolingWishes) -> Pooled:
    """The result in the end of a stream. Raises ApiError when it failed."""
    if (error := outcome_error(finished)) is not None:
        raise error
    vector = finish_vector(finished.vector, wishes.dimensions, wishes.normalize)
    if not (vector.size and np.isfinite(vector).all()):
        raise ApiError(500, "the model made no finite vector of an input")
    return Pooled(vector, finished.ledger)


def usage_of(job: PoolingJob, ledgers: Sequence[Ledger]) -> responses.PooledUsage:
    """All inputs together."""
    tokens = sum(len(prompt.ids) for prompt in job.prompts)
    cached = sum(ledger.cached_tokens for ledger in ledgers)
    return responses.PooledUsage(tokens, tokens, prompt_tokens_details=PromptTokensDetails(cached_tokens=cached))


def _keep(_index: int, pooled: Pooled) -> Pooled:
    return pooled


def _render(index: int, vector: np.ndarray, in_base64: bool) -> msgspec.Raw:
    value = base64.b64encode(vector.astype("<f4").tobytes()).decode() if in_base64 else vector.tolist()
    return msgspec.Raw(encode(responses.Embedding(index=index, embedding=value)))


def _head(job: PoolingJob, kind: str, ledgers: list[Ledger]) -> dict[str, Any]:
    return {
        "id": f"{kind}-{secrets.token_hex(16)}",
        "created": int(time.time()),
        "model": job.model,
        "usage": usage_of(job, ledgers),
        "baton_ledger": ledgers if job.with_ledger else UNSET,
    }
