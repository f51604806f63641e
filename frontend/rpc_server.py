"""The Inference service: messages to the requests that the HTTP API knows, and streams to messages.

Nothing is validated twice: the fields of SamplingParams have the HTTP API's names, and go the same way.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
import msgspec
from google.protobuf.message import Message

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.embedding_requests import EmbeddingRequest
from baton.frontend.api.embeddings import Embedder, Pooled, PoolingJob
from baton.frontend.api.embeddings import usage_of as pooled_usage_of
from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.api.generation import Generator, Job, usage_of
from baton.frontend.api.inputs import check_count
from baton.frontend.api.params import check_model
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.requests import CompletionRequest, DetokenizeRequest, TokenizeRequest, read
from baton.frontend.bodies import MAX_VALUES
from baton.frontend.engine_client import EngineClient
from baton.frontend.in_flight import InFlight
from baton.frontend.model_info import ModelInfo
from baton.proto.config import FrontendConfig
from baton.proto.messages import Ledger, TokenLogprobs
from baton.proto.rpc.schema import schema
from baton.proto.rpc.server import CallError, Context, RpcServer

log = logging.getLogger(__name__)


HEALTH_INTERVAL_S = 1.0
"""How often it is looked whether a request can be served, beside the scheduler's word."""

_CODES = {
    400: grpc.StatusCode.INVALID_ARGUMENT,
    401: grpc.StatusCode.UNAUTHENTICATED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


class InferenceServer:
    """The listening server and its health. Owns both; `stop` frees them."""

    def __init__(
        self,
        config: FrontendConfig,
        client: EngineClient,
        prompts: Prompts,
        info: ModelInfo,
        generator: Generator,
        embedder: Embedder,
        requests: InFlight,
    ) -> None:
        """`requests`: counts the calls."""
        self._client = client
        self._generator = generator
        inference = Inference(prompts, info, generator, embedder, config.stalled_client_s)
        self._server = RpcServer(config.grpc, {"Inference": inference}, requests.one)

    async def start(self) -> None:
        """Listen. Raises UserError when the address is taken or the certificate can't be read."""
        await self._server.start()
        self._health = asyncio.create_task(self._watch_health())

    async def stop(self, grace_s: float) -> None:
        """End what still runs after `grace_s`."""
        self._health.cancel()
        await self._server.stop(grace_s)

    async def _watch_health(self) -> None:
        told = asyncio.Event()
        self._client.on_status(told.set)
        while True:
            await self._server.set_serving(self._client.ready and not self._generator.draining)
            with contextlib.suppress(TimeoutError):  # silence of the scheduler is news too
                await asyncio.wait_for(told.wait(), HEALTH_INTERVAL_S)
            told.clear()


class Inference:
    """The RPCs."""

    def __init__(
        self,
        prompts: Prompts,
        info: ModelInfo,
        generator: Generator,
        embedder: Embedder,
        stalled_client_s: float,
    ) -> None:
        self._prompts = prompts
        self._info = info
        self._generator = generator
        self._embedder = embedder
        self._stalled_client_s = stalled_client_s
        self._messages = _Messages()

    async def generate(self, request: Any, context: Context) -> None:
        received_s = time.monotonic()
        try:
            job = await self._prepare(request, received_s, _timeout_s(context))
            await self._stream(job, context)
        except ApiError as error:
            raise _failure(error) from error

    async def embed(self, request: Any, context: Context) -> Any:
        received_s = time.monotonic()
        try:
            check_count(len(request.inputs), "inputs")
            check_values(request)
            wanted, unknown = read(embedding_fields(request), EmbeddingRequest)
            assert not unknown, f"inference.proto has fields that the API does not know: {unknown}"
            job = await self._embedder.prepare(
                wanted, with_ledger=request.ledger, received_s=received_s, timeout_s=_timeout_s(context)
            )
            done = await self._embedder.run(job, self._messages.vector)
        except ApiError as error:
            raise _failure(error) from error
        return self._messages.vectors(job, done)

    async def tokenize(self, request: Any, _context: Context) -> Any:
        raw = _present(request, ("model", "add_special_tokens", "return_token_strs")) | {"prompt": request.text}
        limit = self._info.max_model_len

        def written(ids: list[int], pieces: list[str] | None) -> Any:
            return self._messages.new("TokenizeResponse", token_ids=ids, token_strs=pieces, max_model_len=limit)

        try:
            wanted, _unknown = read(raw, TokenizeRequest)
            check_model(wanted.model, self._info)
            return await self._prompts.tokenize(wanted, raw, written)
        except ApiError as error:
            raise _failure(error) from error

    async def detokenize(self, request: Any, _context: Context) -> Any:
        try:
            check_values(request)
            raw = _present(request, ("model",)) | {"tokens": list(request.token_ids)}
            wanted, _unknown = read(raw, DetokenizeRequest)
            check_model(wanted.model, self._info)
            text = await self._prompts.detokenize(wanted.tokens)
        except ApiError as error:
            raise _failure(error) from error
        return self._messages.new("DetokenizeResponse", text=text)

    async def list_models(self, _request: Any, _context: Context) -> Any:
        root, limit = self._info.names[0], self._info.max_model_len
        models = [self._messages.new("Model", id=name, root=root, max_model_len=limit) for name in self._info.names]
        return self._messages.new("ListModelsResponse", models=models)

    async def _prepare(self, request: Any, received_s: float, timeout_s: float) -> Job:
        check_values(request)
        raw = completion_fields(request)
        wanted, unknown = read(raw, CompletionRequest)
        assert not unknown, f"inference.proto has fields that the API does not know: {unknown}"
        return await self._generator.prepare(
            wanted, raw, with_ledger=request.ledger, received_s=received_s, timeout_s=timeout_s
        )

    async def _stream(self, job: Job, context: Context) -> None:
        begun: set[int] = set()
        if job.wishes.length_penalty is not None:
            done = await self._generator.beams(job)
            for choice, delta in done:
                await self._write(self._messages.first_piece(choice, delta, job), context)
            await self._write(self._messages.last(job, [choice for choice, _ in done]), context)
            return
        with self._generator.open(job) as (reader, choices):
            while reader.num_open:
                for index, output in (await reader.next()).items():
                    choice = choices[index]
                    new_piece = self._messages.piece if index in begun else self._messages.first_piece
                    begun.add(index)
                    await self._write(new_piece(choice, choice.take(output, reader), job), context)
        await self._write(self._messages.last(job, choices), context)

    async def _write(self, message: Any, context: Context) -> None:
        """A client that does not read holds no worker up, but it can't hold its request for ever."""
        try:
            async with asyncio.timeout(self._stalled_client_s):
                await context.write(message)
        except TimeoutError:
            log.warning("a client has read nothing for %.0f s: its request is aborted", self._stalled_client_s)
            text = f"nothing was read for {self._stalled_client_s:.0f} s"
            raise CallError(grpc.StatusCode.DEADLINE_EXCEEDED, text) from None


def _timeout_s(context: Context) -> float:
    """Until the call's deadline; 0 without one."""
    remaining_s = context.time_remaining()
    return 0.0 if remaining_s is None else max(remaining_s, 1e-3)


def check_values(request: Message) -> None:
    """Lists are bounded as in the body of an HTTP request (bodies.py), and for the same reason. Raises ApiError."""
    if _num_values(request) > MAX_VALUES:
        raise bad_request(f"the request has more than {MAX_VALUES} values; send them in several requests")


def _num_values(message: Message) -> int:
    """Entries of all lists in it."""
    count = 0
    for field, value in message.ListFields():
        if isinstance(value, Message):
            count += _num_values(value)
        elif isinstance(value, Sequence | Mapping) and not isinstance(value, str):
            count += len(value)
            if isinstance(value, Sequence) and field.message_type is not None:
                count += sum(map(_num_values, value))
    return count


def completion_fields(request: Any) -> dict[str, Any]:
    """A GenerateRequest as the fields of POST /v1/completions that it sets."""
    raw = _present(request, ("model", "priority", "add_special_tokens")) | _plain(request.sampling)
    prompt = request.WhichOneof("prompt")
    raw["prompt"] = request.text if prompt == "text" else list(request.token_ids.ids)
    return raw


def embedding_fields(request: Any) -> dict[str, Any]:
    """An EmbedRequest as the fields of POST /v1/embeddings that it sets."""
    raw = {field.name: value for field, value in request.ListFields() if field.name not in ("inputs", "ledger")}
    inputs = [each.text if each.WhichOneof("input") == "text" else list(each.token_ids.ids) for each in request.inputs]
    return raw | {"input": inputs}


def _plain(value: Any) -> Any:
    """As JSON would have it; fields that are not set are absent."""
    match value:
        case Message():
            return {field.name: _plain(part) for field, part in value.ListFields()}
        case Mapping():
            return {str(key): part for key, part in value.items()}
        case str():
            return value
        case Sequence():
            return list(value)
    return value


def _present(request: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {field.name: value for field, value in request.ListFields() if field.name in names}


def _failure(error: ApiError) -> CallError:
    code = _CODES.get(error.status, grpc.StatusCode.INTERNAL)
    if error.body.error.code == "cancelled":
        code = grpc.StatusCode.CANCELLED
    retry_after = error.headers.get("Retry-After")
    return CallError(code, str(error), float(retry_after) if retry_after else None)


class _Messages:
    """What streams deliver, as messages of inference.proto."""

    def __init__(self) -> None:
        self._piece = schema().message("GenerateResponse")
        self._logprobs = schema().message("TokenLogprobs")
        self._reasons = schema().enum("FinishReason")

    def new(self, message: str, /, **fields: Any) -> Any:
        return schema().message(message)(**fields)

    def first_piece(self, choice: Choice, delta: Delta, job: Job) -> Any:
        """With what is told once of each output stream."""
        message = self.piece(choice, delta, job)
        if job.wishes.return_token_ids:
            message.prompt_token_ids.extend(choice.prompt.ids.tolist())
        if job.wishes.prompt_logprobs is not None and choice.prompt_logprobs is not None:
            message.prompt_logprobs.extend(map(self._logprob, choice.prompt_logprobs.entries()))
        return message

    def piece(self, choice: Choice, delta: Delta, _job: Job) -> Any:
        message = self._piece(index=choice.index, text=delta.text, token_ids=delta.token_ids)
        if delta.logprobs:
            message.logprobs.extend(map(self._logprob, delta.logprobs))
        if delta.finish_reason is not None:
            message.finish_reason = self._reasons[delta.finish_reason.upper()]
        if isinstance(delta.stop_reason, str):
            message.stop_string = delta.stop_reason
        elif delta.stop_reason is not None:
            message.stop_token_id = delta.stop_reason
        return message

    def _logprob(self, entry: TokenLogprobs) -> Any:
        top = [{"token_id": id, "logprob": logprob} for id, logprob in entry.top]
        return self._logprobs(logprob=entry.logprob, rank=entry.rank, top=top)

    def last(self, job: Job, choices: list[Choice]) -> Any:
        usage = usage_of(job, choices)
        message = self._piece(usage={"prompt_tokens": usage.prompt_tokens})
        message.usage.completion_tokens = usage.completion_tokens
        message.usage.cached_tokens = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        if job.with_ledger:
            message.ledgers.extend(msgspec.json.encode(choice.ledger).decode() for choice in choices)
        return message

    def vector(self, _index: int, pooled: Pooled) -> tuple[Any, Ledger]:
        return self.new("Embedding", values=pooled.vector.tolist()), pooled.ledger

    def vectors(self, job: PoolingJob, done: list[tuple[Any, Ledger]]) -> Any:
        ledgers = [ledger for _, ledger in done]
        usage = pooled_usage_of(job, ledgers)
        message = self.new("EmbedResponse", usage={"prompt_tokens": usage.prompt_tokens})
        message.usage.cached_tokens = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
        message.embeddings.extend(vector for vector, _ in done)
        if job.with_ledger:
            message.ledgers.extend(msgspec.json.encode(ledger).decode() for ledger in ledgers)
        return message
