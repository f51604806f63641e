"""A request's streams from submission to the last byte of the answer."""

import asyncio
import contextlib
import dataclasses
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, Self

from msgspec import UNSET

from baton.frontend.api.beam_runs import BeamRun
from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError, bad_request, unavailable
from baton.frontend.api.formats import ChatFormat, CompletionFormat, Format, LedgerField
from baton.frontend.api.params import MAX_STREAMS, Wishes, read_wishes
from baton.frontend.api.prompts import Prompt, Prompts
from baton.frontend.api.requests import ChatCompletionRequest, CompletionRequest, GenerationRequest, StreamOptions
from baton.frontend.api.responses import CompletionTokensDetails, PromptTokensDetails, Usage, encode
from baton.frontend.api.sse import DONE, ChunkWriter, event
from baton.frontend.engine_client import EngineClient, Output, OutputReader
from baton.frontend.model_info import ModelInfo
from baton.frontend.structured.constraint import Constraint, read_constraint
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
        if request.stream_options not in (None, StreamOptions()) and not request.stream:
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
        wishes.check_answer(sum(len(prompt.ids) for prompt in prompts))
        if wishes.bad_words:
            wishes = wishes.without_words(await self._prompts.bad_words(wishes.bad_words))
        # A tool that must be called goes before a form of the answer.
        constraint = (plan.constraint if plan is not None else None) or read_constraint(request)
        if constraint is not None:
            before = self._tools.before_answer(plan) if plan is not None else ""
            plan = dataclasses.replace(plan, spaced=bool(before)) if plan is not None else None
            wishes = await self._constrain(wishes, constraint, before)
        wishes.check_volume(len(prompts))
        format = self._format(request, wishes)
        options = request.stream_options or StreamOptions()
        return Job(prompts, wishes, format, options, with_ledger, received_s, timeout_s, plan)

    async def _constrain(self, wishes: Wishes, constraint: Constraint, before: str) -> Wishes:
        """`before`: rules of what may stand before the answer."""
        if wishes.length_penalty is not None:
            raise bad_request(
                "a beam search follows the model's own probabilities and can't hold the output to a form: leave out "
                "use_beam_search, or the form and the tools that must be called.",
                "use_beam_search",
            )
        return wishes.constrained(await self._grammars.get(constraint, before), self._info)

    def _format(self, request: GenerationRequest, wishes: Wishes) -> Format:
        model = request.model or self._info.names[0]
        kind = ChatFormat if isinstance(request, ChatCompletionRequest) else CompletionFormat
        return kind(model, wishes, self._prompts.tokenizer)

    async def whole(self, job: Job) -> bytes:
        """The answer as one JSON document. Raises ApiError."""
        if job.wishes.length_penalty is not None:
            done = await self.beams(job)
        else:
            with OutputReader(self._client, job.received_s, job.wishes.request_id) as reader:
                done = [(choice, Delta()) for choice in self._submit(job, reader)]
                while reader.num_open:
                    for index, output in (await reader.next()).items():
                        choice, delta = done[index]
                        delta.extend(choice.take(output, reader))
        choices = [choice for choice, _ in done]

        def written() -> bytes:
            return encode(job.format.whole(done, usage_of(job, choices), _ledger(job, choices)))

        # Log-probabilities take up to seconds, for which the event loop must not be held up.
        return await self._prompts.in_thread(written) if job.wishes.has_logprobs else written()

    async def beams(self, job: Job) -> list[tuple[Choice, Delta]]:
        """The answers of a beam search, which has none before its end. Raises ApiError."""
        run = BeamRun(self._client, job.prompts, job.wishes, self._info, job.received_s)
        deadline = job.received_s + job.timeout_s if job.timeout_s else float("inf")
        return await run.finish(self._prompts.tokenizer, job.plan, deadline)

    @contextlib.contextmanager
    def events(self, job: Job) -> "Iterator[Events | BeamEvents]":
        """The answer as server-sent events; what still runs at the end of the block is aborted. Raises ApiError."""
        if job.wishes.length_penalty is not None:
            with BeamEvents(job, self.beams(job)) as beams:
                yield beams
            return
        with OutputReader(self._client, job.received_s, job.wishes.request_id) as reader:
            yield Events(job, reader, self._submit(job, reader))

    @contextlib.contextmanager
    def open(self, job: Job) -> "Iterator[tuple[OutputReader, list[Choice]]]":
        """The job's streams, and what turns their outputs into deltas; what still runs at the end of the block is
        aborted. Raises ApiError."""
        with OutputReader(self._client, job.received_s, job.wishes.request_id) as reader:
            yield reader, self._submit(job, reader)

    def _submit(self, job: Job, reader: OutputReader) -> list[Choice]:
        choices: list[Choice] = []
        for prompt in job.prompts:
            base = job.wishes.for_prompt(len(prompt.ids), self._info, "prompt")
            first = len(choices)
            for sample in range(job.wishes.n):
                params = job.wishes.sample(base, sample)
                sibling = first if sample else None
                choices.append(Choice(len(choices), prompt, params, job.wishes, self._prompts.tokenizer, job.plan))
                reader.submit(prompt.ids, params, prompt.hashes, job.wishes.priority, job.timeout_s, sibling)
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
            data += _last(self._job, self._choices)
        return data

    def _events(self, index: int, output: Output) -> bytes:
        """Of one choice. A token has its event although its text is yet to come, or never comes: who times a stream
        takes events for tokens, as those of vLLM are. Where text is read for reasoning and calls it may be none."""
        choice = self._choices[index]
        delta = choice.take(output, self._reader)
        if held := self._held.pop(index, None):
            held.extend(delta)
            delta = held
        by_token = self._job.wishes.per_token or (self._job.plan is None and bool(delta.token_ids))
        if not (delta.brings or by_token):
            self._held[index] = delta
            return b""
        first = index not in self._begun
        if first:
            self._begun.add(index)
        return self._writer.chunk(choice, delta, first)


class BeamEvents:
    """A beam search as a streamed answer: everything comes at its end. Leaving the `with` block aborts it."""

    def __init__(self, job: Job, search: Coroutine[Any, Any, list[tuple[Choice, Delta]]]) -> None:
        self._job = job
        self._task = asyncio.ensure_future(search)
        self.ended = False
        """The last event has been taken."""

    def on_output(self, callback: Callable[[], None]) -> None:
        """Call this when the search is over."""
        self._task.add_done_callback(lambda _: callback())

    def take(self) -> bytes:
        """The whole answer. Raises ApiError."""
        done = self._task.result()
        self.ended = True
        writer = ChunkWriter(self._job.format, self._job.stream_options, plain=False)
        data = b"".join(writer.chunk(choice, delta, first=True) for choice, delta in done)
        return data + _last(self._job, [choice for choice, _ in done])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._task.cancel()


def _last(job: Job, choices: list[Choice]) -> bytes:
    """What stands behind the choices' events."""
    if not (job.stream_options.include_usage or job.with_ledger):
        return DONE
    usage = usage_of(job, choices) if job.stream_options.include_usage else UNSET
    return event(job.format.last(usage, _ledger(job, choices))) + DONE


def usage_of(job: Job, choices: list[Choice]) -> Usage:
    """Each prompt counts once, however many samples it has."""
    prompt_tokens = sum(len(prompt.ids) for prompt in job.prompts)
    completion_tokens = sum(choice.num_tokens for choice in choices)
    usage = Usage(prompt_tokens, prompt_tokens + completion_tokens, completion_tokens)
    cached = sum(choice.cached_tokens for choice in choices[:: job.wishes.n])
    usage.prompt_tokens_details = PromptTokensDetails(cached)
    if job.plan is not None and job.plan.new_reasoning_parser is not None:
        reasoning = sum(choice.reasoning_tokens for choice in choices)
        usage.completion_tokens_details = CompletionTokensDetails(reasoning)
    return usage


def _ledger(job: Job, choices: list[Choice]) -> LedgerField:
    if not job.with_ledger:
        return UNSET
    return choices[0].ledger if len(choices) == 1 else [choice.ledger for choice in choices]
