"""A request's streams from submission to the last byte of the answer."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError, bad_request, unavailable
from baton.frontend.api.formats import ChatFormat, CompletionFormat, Format, LedgerField, UsageField
from baton.frontend.api.params import MAX_STREAMS, Wishes, read_wishes
from baton.frontend.api.prompts import Prompt, Prompts
from baton.frontend.api.requests import ChatCompletionRequest, GenerationRequest, StreamOptions
from baton.frontend.api.responses import PromptTokensDetails, Usage, encode
from baton.frontend.engine_client import EngineClient, OutputReader
from baton.frontend.model_info import ModelInfo

DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True)
class Job:
    """A request that has been checked and tokenised."""

    prompts: list[Prompt]
    wishes: Wishes
    format: Format
    stream_options: StreamOptions
    with_ledger: bool
    received_s: float


class Generator:
    """Runs requests on the cluster."""

    def __init__(self, client: EngineClient, prompts: Prompts, info: ModelInfo, max_logprobs: int) -> None:
        self._client = client
        self._prompts = prompts
        self._info = info
        self._max_logprobs = max_logprobs
        self.draining = False
        """New requests are refused: the server stops."""

    async def prepare(
        self, request: GenerationRequest, raw: dict[str, Any], *, with_ledger: bool, received_s: float
    ) -> Job:
        """Check, render and tokenise. Raises ApiError."""
        if self.draining:
            raise unavailable("the server is shutting down; send the request to another one")
        if request.stream_options is not None and not request.stream:
            raise bad_request("stream_options needs stream to be true.", "stream_options")
        wishes = read_wishes(request, self._info, self._max_logprobs)
        model = request.model or self._info.names[0]
        format: Format
        if isinstance(request, ChatCompletionRequest):
            prompts = [await self._prompts.chat(request, raw)]
            format = ChatFormat(model, wishes, self._prompts.tokenizer)
        else:
            prompts = await self._prompts.completion(request)
            format = CompletionFormat(model, wishes, self._prompts.tokenizer)
        if not 0 < len(prompts) * wishes.n <= MAX_STREAMS:
            raise bad_request(
                f"{len(prompts)} prompts times n = {wishes.n}: must be from 1 to {MAX_STREAMS}.", "prompt"
            )
        return Job(prompts, wishes, format, request.stream_options or StreamOptions(), with_ledger, received_s)

    async def whole(self, job: Job) -> bytes:
        """The answer as one JSON document. Raises ApiError."""
        with OutputReader(self._client, job.received_s) as reader:
            choices = self._submit(job, reader)
            texts = [Delta() for _ in choices]
            while reader.num_open:
                for index, output in (await reader.next()).items():
                    texts[index].extend(choices[index].take(output, reader))
        answer = job.format.whole(list(zip(choices, texts, strict=True)), _usage(job, choices), _ledger(job, choices))
        return encode(answer)

    async def events(self, job: Job) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, several in one piece when they come together. Raises ApiError before the
        first event; a later error is an event."""
        with OutputReader(self._client, job.received_s) as reader:
            choices = self._submit(job, reader)
            held = [Delta() for _ in choices]
            begun = [False] * len(choices)
            while reader.num_open:
                outputs = await reader.next()
                data = bytearray()
                try:
                    for index, output in outputs.items():
                        held[index].extend(choices[index].take(output, reader))
                        if held[index].text or held[index].finish_reason or job.wishes.per_token:
                            self._write(data, job, choices[index], held[index], first=not begun[index])
                            held[index], begun[index] = Delta(), True
                except ApiError as error:
                    if not any(begun):
                        raise
                    yield bytes(data) + _event(error.body) + DONE
                    return
                if data:
                    yield bytes(data)
        if job.stream_options.include_usage or job.with_ledger:
            usage = _usage(job, choices) if job.stream_options.include_usage else UNSET
            yield _event(job.format.last(usage, _ledger(job, choices))) + DONE
        else:
            yield DONE

    def _submit(self, job: Job, reader: OutputReader) -> list[Choice]:
        choices: list[Choice] = []
        for prompt in job.prompts:
            base = job.wishes.for_prompt(len(prompt.ids), self._info, "prompt")
            for sample in range(job.wishes.n):
                params = job.wishes.sample(base, sample)
                choices.append(Choice(len(choices), prompt, params, job.wishes, self._prompts.tokenizer))
                reader.submit(prompt.ids, params, prompt.hashes, job.wishes.priority)
        return choices

    def _write(self, data: bytearray, job: Job, choice: Choice, delta: Delta, first: bool) -> None:
        options = job.stream_options
        usage: UsageField = None if options.include_usage else UNSET
        if options.continuous_usage_stats:
            prompt_len = len(choice.prompt.ids)
            usage = Usage(prompt_len, prompt_len + choice.num_tokens, choice.num_tokens)
        for chunk in job.format.chunks(choice, delta, first, usage):
            data += _event(chunk)


def _event(body: object) -> bytes:
    return b"data: " + encode(body) + b"\n\n"


def _usage(job: Job, choices: list[Choice]) -> Usage:
    """Each prompt counts once, however many samples it has."""
    prompt_tokens = sum(len(prompt.ids) for prompt in job.prompts)
    completion_tokens = sum(choice.num_tokens for choice in choices)
    cached = sum(choice.cached_tokens for choice in choices[:: job.wishes.n])
    return Usage(
        prompt_tokens, prompt_tokens + completion_tokens, completion_tokens, PromptTokensDetails(cached_tokens=cached)
    )


def _ledger(job: Job, choices: list[Choice]) -> LedgerField:
    if not job.with_ledger:
        return UNSET
    return choices[0].ledger if len(choices) == 1 else [choice.ledger for choice in choices]
