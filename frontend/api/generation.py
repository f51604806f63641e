"""A request's streams from submission to the last byte of the answer."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError, bad_request, unavailable
from baton.frontend.api.formats import ChatFormat, CompletionFormat, Format, LedgerField
from baton.frontend.api.params import MAX_STREAMS, Wishes, read_wishes
from baton.frontend.api.prompts import Prompt, Prompts
from baton.frontend.api.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest, StreamOptions
from baton.frontend.api.responses import PromptTokensDetails, Usage, encode
from baton.frontend.api.sse import DONE, ChunkWriter, event
from baton.frontend.engine_client import EngineClient, Output, OutputReader
from baton.frontend.model_info import ModelInfo
from baton.frontend.structured.constraint import read_constraint
from baton.frontend.structured.grammars import Grammars
from baton.frontend.tools.plan import OutputPlan, ToolServing


@dataclass(frozen=True)
class Job:
    """A request that has been checked and tokenised."""

    prompts: list[Prompt]
    wishes: Wishes
    format: Format
    stream_options: StreamOptions
    with_ledger: bool
    received_s: float
    timeout_s: float = 0.0
    """Until the client's deadline; 0: none."""
    plan: OutputPlan | None = None
    """How the text of a chat answer is read; None: it is all content."""


class Generator:
    """Runs requests on the cluster."""

    def __init__(
        self,
        client: EngineClient,
        prompts: Prompts,
        grammars: Grammars,
        tools: ToolServing,
        info: ModelInfo,
        max_logprobs: int,
    ) -> None:
        self._client = client
        self._prompts = prompts
        self._grammars = grammars
        self._tools = tools
        self._info = info
        self._max_logprobs = max_logprobs
        self.draining = False
        """New requests are refused: the server stops."""

    async def prepare(
        self,
        request: GenerationRequest,
        raw: dict[str, Any],
        *,
        with_ledger: bool,
        received_s: float,
        timeout_s: float = 0.0,
    ) -> Job:
        """Check, render and tokenise. Raises ApiError."""
        if self.draining:
            raise unavailable("the server is shutting down; send the request to another one")
        if request.stream_options is not None and not request.stream:
            raise bad_request("stream_options needs stream to be true.", "stream_options")
        wishes = read_wishes(request, self._info, self._max_logprobs)
        plan = None
        if isinstance(request, ChatCompletionRequest):
            prompts = [await self._prompts.chat(request, raw)]
            plan = self._tools.plan(request, raw.get("tools") or (), prompts[0].ids)
            wishes = wishes.keeping_special_tokens() if plan and plan.keeps_special_tokens else wishes
        else:
            _check_fan_out(request, wishes.n)
            prompts = await self._prompts.completion(request)
        wishes = await self._constrain(wishes, request, plan)
        format = self._format(request, wishes)
        options = request.stream_options or StreamOptions()
        return Job(prompts, wishes, format, options, with_ledger, received_s, timeout_s, plan)

    async def _constrain(self, wishes: Wishes, request: GenerationRequest, plan: OutputPlan | None) -> Wishes:
        """A tool that must be called goes before a form of the answer."""
        constraint = plan.constraint if plan is not None else None
        constraint = constraint or read_constraint(request)
        if constraint is None:
            return wishes
        before = self._tools.before_answer(plan) if plan is not None else ""
        return wishes.constrained(await self._grammars.get(constraint, before), self._info)

    def _format(self, request: GenerationRequest, wishes: Wishes) -> Format:
        model = request.model or self._info.names[0]
        kind = ChatFormat if isinstance(request, ChatCompletionRequest) else CompletionFormat
        return kind(model, wishes, self._prompts.tokenizer)

    async def whole(self, job: Job) -> bytes:
        """The answer as one JSON document. Raises ApiError."""
        with OutputReader(self._client, job.received_s) as reader:
            choices = self._submit(job, reader)
            texts = [Delta() for _ in choices]
            while reader.num_open:
                for index, output in (await reader.next()).items():
                    texts[index].extend(choices[index].take(output, reader))
        answer = job.format.whole(list(zip(choices, texts, strict=True)), usage_of(job, choices), _ledger(job, choices))
        return encode(answer)

    @contextlib.contextmanager
    def events(self, job: Job) -> "Iterator[Events]":
        """The answer as server-sent events; what still runs at the end of the block is aborted. Raises ApiError."""
        with OutputReader(self._client, job.received_s) as reader:
            yield Events(job, reader, self._submit(job, reader))

    @contextlib.contextmanager
    def open(self, job: Job) -> "Iterator[tuple[OutputReader, list[Choice]]]":
        """The job's streams, and what turns their outputs into deltas; what still runs at the end of the block is
        aborted. Raises ApiError."""
        with OutputReader(self._client, job.received_s) as reader:
            yield reader, self._submit(job, reader)

    def _submit(self, job: Job, reader: OutputReader) -> list[Choice]:
        choices: list[Choice] = []
        for prompt in job.prompts:
            base = job.wishes.for_prompt(len(prompt.ids), self._info, "prompt")
            for sample in range(job.wishes.n):
                params = job.wishes.sample(base, sample)
                choices.append(Choice(len(choices), prompt, params, job.wishes, self._prompts.tokenizer, job.plan))
                reader.submit(prompt.ids, params, prompt.hashes, job.wishes.priority, job.timeout_s)
        return choices


def _check_fan_out(request: CompletionRequest, n: int) -> None:
    """Before a prompt is tokenised. Raises ApiError."""
    prompt = request.prompt
    several = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    count = len(prompt) if several else 1
    if count * n > MAX_STREAMS:
        raise bad_request(f"{count} prompts times n = {n}: must be at most {MAX_STREAMS}.", "prompt")


class Events:
    """A streamed answer, as far as it has come."""

    def __init__(self, job: Job, reader: OutputReader, choices: list[Choice]) -> None:
        self._job = job
        self._reader = reader
        self._choices = choices
        self._held: dict[int, Delta] = {}
        self._begun: set[int] = set()
        self._writer = ChunkWriter(job.format, job.stream_options, plain=not job.wishes.per_token and job.plan is None)
        self.ended = False
        """The last event has been taken."""

    def on_output(self, callback: Callable[[], None]) -> None:
        """Call this when something has come after everything was taken."""
        self._reader.on_output = callback

    def take(self) -> bytes:
        """What has come since the last time. Raises ApiError before the first event; a later error is an event."""
        data = b""
        try:
            for index, output in self._reader.take().items():
                data += self._events(index, output)
        except ApiError as error:
            if not self._begun:
                raise
            self.ended = True
            return data + event(error.body) + DONE
        if not self._reader.num_open:
            self.ended = True
            data += self._last()
        return data

    def _events(self, index: int, output: Output) -> bytes:
        """Of one choice; none while its text may still change."""
        choice = self._choices[index]
        delta = choice.take(output, self._reader)
        if held := self._held.pop(index, None):
            held.extend(delta)
            delta = held
        if not (delta.brings or self._job.wishes.per_token):
            self._held[index] = delta
            return b""
        first = index not in self._begun
        if first:
            self._begun.add(index)
        return self._writer.chunk(choice, delta, first)

    def _last(self) -> bytes:
        job, choices = self._job, self._choices
        if not (job.stream_options.include_usage or job.with_ledger):
            return DONE
        usage = usage_of(job, choices) if job.stream_options.include_usage else UNSET
        return event(job.format.last(usage, _ledger(job, choices))) + DONE


def usage_of(job: Job, choices: list[Choice]) -> Usage:
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
