"""Offline use: one process, no server. The interface is vLLM's where the meaning is the same.

from baton.frontend import LLM, SamplingParams

with LLM("demo") as llm:
    for output in llm.generate(["The capital of France is"], SamplingParams(temperature=0, max_tokens=8)):
        print(output.outputs[0].text)
"""

import importlib
import time
from collections.abc import Sequence
from itertools import islice
from typing import Any, Literal

import msgspec
import numpy as np

from baton.frontend.api.beam_runs import new_search, step_params
from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError
from baton.frontend.api.params import Wishes, read_wishes
from baton.frontend.api.prompts import Prompt, Prompts
from baton.frontend.api.requests import ChatCompletionRequest, CompletionRequest
from baton.frontend.beams import BeamSearch, Ended
from baton.frontend.chat_template import load_chat_template
from baton.frontend.engine_client import Output
from baton.frontend.instructions import Finished
from baton.frontend.llm_pooling import EmbeddingRequestOutput, OfflinePooling, PoolingParams, ScoringRequestOutput
from baton.frontend.model_info import load_model_info
from baton.frontend.pooling import load_pooling_info
from baton.frontend.structured.constraint import StructuredOutputs, read_constraint
from baton.frontend.structured.grammars import Grammars
from baton.frontend.tokenizer import Tokenizer, load_tokenizer
from baton.proto.config import BatchConfig, CacheConfig, ModelConfig, PoolerConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.hashing import extend_packed
from baton.proto.lifecycle import FinishReason, Outcome, Role, Stage
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import Ledger, Sid, TokenLogprobs
from baton.proto.messages import SamplingParams as WorkerParams

PromptLike = str | Sequence[int]
Conversation = Sequence[dict[str, Any]]


class SamplingParams(msgspec.Struct, kw_only=True, frozen=True):
    """How outputs are drawn. None is the model's own default, from generation_config.json."""

    n: int = 1
    """Outputs per prompt."""
    max_tokens: int | None = 16
    """None: what the context leaves."""
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    logprobs: int | None = None
    """Alternatives per token; 0: the chosen token's own."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    logprob_token_ids: list[int] | None = None
    """With logprobs: these tokens in place of the best."""
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: int | None = None
    """Keep so many of the prompt's tokens; -1: as many as fit."""
    truncation_side: Literal["left", "right"] | None = None
    """Where the prompt loses the others; the left by default."""
    cache_salt: str | None = None
    """Prompts with another salt, or without one, share no cached KV with this one."""
    priority: int = 0
    structured_outputs: StructuredOutputs | None = None
    """What form outputs must have: a JSON schema, a regular expression, …"""


class BeamSearchParams(msgspec.Struct, kw_only=True, frozen=True):
    """A beam search: the `beam_width` likeliest outputs that it finds."""

    beam_width: int
    max_tokens: int = 16
    ignore_eos: bool = False
    length_penalty: float = 1.0
    """An output's log-probability is divided by its length to this power: above 0 longer ones gain."""
    include_stop_str_in_output: bool = False
    """Keep the end token in the text."""


class BeamSearchSequence(msgspec.Struct):
    """One output of a beam search."""

    tokens: list[int]
    """Prompt and output."""
    text: str
    """Of both."""
    logprobs: list[dict[int, "Logprob"]]
    """Per output token: token id -> Logprob, of the chosen token and the best ones."""
    cum_logprob: float
    finish_reason: str
    stop_reason: int | None


class BeamSearchOutput(msgspec.Struct):
    """What became of one prompt."""

    sequences: list[BeamSearchSequence]
    """Best first."""


class Logprob(msgspec.Struct):
    """Of one token at one position."""

    logprob: float
    rank: int
    decoded_token: str


class CompletionOutput(msgspec.Struct):
    """One sample."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None
    logprobs: list[dict[int, Logprob]] | None
    """Per output token: token id -> Logprob, of the chosen token and the best ones."""
    finish_reason: str | None
    stop_reason: int | str | None


class RequestOutput(msgspec.Struct):
    """What became of one prompt."""

    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    ledgers: list[Ledger]
    """Per sample: what was computed and when."""
    num_cached_tokens: int
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    """When asked for: per prompt token as of outputs; None for the first, which follows nothing."""
    finished: bool = True


class LLM:
    """A model in this process. Owns the engine; close() frees it."""

    def __init__(
        self,
        model: str,
        *,
        tokenizer: str = "",
        chat_template: str = "",
        revision: str = "",
        dtype: str = "auto",
        batch_invariant: bool = False,
        load_format: str = "auto",
        seed: int = 0,
        max_model_len: int = 0,
        device: str = "cpu",
        gpu: int = 0,
        attention_backend: str = "auto",
        threads: int = 0,
        cache: CacheConfig | None = None,
        batch: BatchConfig | None = None,
        max_logprobs: int = 20,
        pooler: PoolerConfig | None = None,
    ) -> None:
        """`model` is a directory, a .gguf file, a hub id or 'demo'. Raises UserError for what the user can mend."""
        path = _resolve(model, revision)
        config = ModelConfig(
            path=path,
            served_names=(model,),
            dtype=dtype,
            batch_invariant=batch_invariant,
            load_format=load_format,
            max_model_len=max_model_len,
            tokenizer=tokenizer,
            chat_template=chat_template,
            seed=seed,
        )
        text = load_tokenizer(config)
        info = load_model_info(config, text)
        template = load_chat_template(config, text)
        pooling = load_pooling_info(path, pooler or PoolerConfig())
        worker = WorkerConfig(
            name="offline",
            role=Role.UNIFIED.value,
            model=config,
            cache=cache or CacheConfig(),
            batch=msgspec.structs.replace(batch or BatchConfig(target_itl_ms=0.0), prompts_first=True),
            device=device,
            gpu=gpu,
            attention_backend=attention_backend,
            threads=threads,
        )
        self._engine = importlib.import_module("baton.worker.engine").Engine(worker)
        self._info = msgspec.structs.replace(info, max_model_len=self._engine.max_model_len)
        self._prompts = Prompts(text, template, self._info)
        self._grammars = Grammars(text, self._info)
        self._pooling = OfflinePooling(self._engine, text, self._info, pooling)
        self._max_logprobs = max_logprobs
        self._next_sid = 0

    def generate(
        self,
        prompts: PromptLike | Sequence[PromptLike],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt (text or token ids), in the order given; sampling_params are of all or one per prompt.

        Raises ValueError for bad arguments.
        """
        try:
            if sampling_params is None or isinstance(sampling_params, SamplingParams):
                return self._run(self._completions(prompts, sampling_params or SamplingParams()))
            if len(sampling_params) != len(prompts):
                raise ValueError(f"{len(prompts)} prompts but {len(sampling_params)} sampling_params")
            pairs = zip(prompts, sampling_params, strict=True)
            return self._run([each for prompt, params in pairs for each in self._completions([prompt], params)])
        except ApiError as error:
            raise ValueError(str(error)) from error

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | None = None,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or several. Raises ValueError for bad arguments."""
        conversations = [messages] if isinstance(messages[0], dict) else messages
        options = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "chat_template_kwargs": chat_template_kwargs,
        }
        try:
            raws = [{"messages": list(conversation)} | options for conversation in conversations]
            prompts = [self._prompts.of_chat(msgspec.convert(raw, ChatCompletionRequest), raw) for raw in raws]
            wishes = self._wishes(sampling_params or SamplingParams())
            return self._run([(prompt, wishes) for prompt in prompts])
        except (ApiError, msgspec.ValidationError) as error:
            raise ValueError(str(error)) from error

    def embed(
        self, prompts: PromptLike | Sequence[PromptLike], *, pooling_params: PoolingParams | None = None
    ) -> list[EmbeddingRequestOutput]:
        """The vector of each prompt (text or token ids), in the order given. Raises ValueError for bad arguments."""
        try:
            return self._pooling.embed(_plain(prompts), pooling_params or PoolingParams())
        except (ApiError, msgspec.ValidationError) as error:
            raise ValueError(str(error)) from error

    def score(
        self,
        data_1: str | Sequence[str],
        data_2: str | Sequence[str],
        /,
        *,
        pooling_params: PoolingParams | None = None,
    ) -> list[ScoringRequestOutput]:
        """Cosine similarity of each pair, or of one text with each of the others. Raises ValueError for bad
        arguments."""
        try:
            return self._pooling.score(_plain(data_1), _plain(data_2), pooling_params or PoolingParams())
        except (ApiError, msgspec.ValidationError) as error:
            raise ValueError(str(error)) from error

    def beam_search(
        self, prompts: PromptLike | Sequence[PromptLike], params: BeamSearchParams
    ) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt. Raises ValueError for bad arguments."""
        request = CompletionRequest(
            prompt=_plain(prompts),
            n=params.beam_width,
            max_tokens=params.max_tokens,
            ignore_eos=params.ignore_eos,
            use_beam_search=True,
            length_penalty=params.length_penalty,
        )
        try:
            wishes = read_wishes(request, self._info, self._max_logprobs)
            found = self._prompts.of_completion(request)
            each = [wishes.for_prompt(len(prompt.ids), self._info, "prompt") for prompt in found]
        except ApiError as error:
            raise ValueError(str(error)) from error
        searches = [new_search(given, wishes) for given in each]
        while any(not search.done for search in searches):
            self._step_beams(found, searches)
        return [
            BeamSearchOutput([self._sequence(prompt, ended, params) for ended in search.best()])
            for prompt, search in zip(found, searches, strict=True)
        ]

    def _step_beams(self, prompts: list[Prompt], searches: list[BeamSearch]) -> None:
        """Every running beam goes on by one token."""
        rows: dict[Sid, TokenLogprobs] = {}
        asked: list[list[Sid]] = [[] for _ in searches]
        for index, (prompt, search) in enumerate(zip(prompts, searches, strict=True)):
            for beam in [] if search.done else search.running:
                ids = np.concatenate([prompt.ids, np.array(beam.tokens, dtype=np.int32)])
                asked[index].append(self._add(step_params(search), ids, extend_packed(prompt.hashes, ids)))
        count = sum(map(len, asked))
        while len(rows) < count:
            for row in self._engine.step():
                if row.finish is not None and row.finish.reason == FinishReason.ERROR:
                    raise RuntimeError(row.finish.message or "the engine failed")
                rows[row.sid] = row.logprobs[0]
        for search, sids in zip(searches, asked, strict=True):
            if not search.done:
                search.advance([rows[sid] for sid in sids])

    def _sequence(self, prompt: Prompt, ended: Ended, params: BeamSearchParams) -> BeamSearchSequence:
        beam = ended.beam
        tokens = [*prompt.ids.tolist(), *beam.tokens]
        shown = tokens if params.include_stop_str_in_output or not ended.by_token else tokens[:-1]
        return BeamSearchSequence(
            tokens=tokens,
            text=self._prompts.tokenizer.decode(shown, skip_special_tokens=not params.include_stop_str_in_output),
            logprobs=[self._position(id, entry) for id, entry in zip(beam.tokens, beam.logprobs, strict=True)],
            cum_logprob=beam.total,
            finish_reason=(Outcome.STOP if ended.by_token else Outcome.LENGTH).value,
            stop_reason=beam.tokens[-1] if ended.by_token else None,
        )

    def get_tokenizer(self) -> Tokenizer:
        """The model's, or the one that was named."""
        return self._prompts.tokenizer

    def close(self) -> None:
        """Free the model and its KV pool."""
        self._prompts.close()
        self._grammars.close()
        self._engine.close()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _wishes(self, params: SamplingParams) -> Wishes:
        given = msgspec.structs.asdict(params)
        bias = given.pop("logit_bias")
        request = CompletionRequest(
            prompt="", logit_bias={str(id): value for id, value in bias.items()} if bias else None, **given
        )
        wishes = read_wishes(request, self._info, self._max_logprobs)
        wishes = wishes.without_words(self._prompts.of_bad_words(wishes.bad_words))
        constraint = read_constraint(request)
        return wishes if constraint is None else wishes.constrained(self._grammars.make(constraint), self._info)

    def _completions(self, prompts: Any, params: SamplingParams) -> list[tuple[Prompt, Wishes]]:
        wishes = self._wishes(params)
        request = CompletionRequest(
            prompt=_plain(prompts),
            max_tokens=params.max_tokens,
            add_special_tokens=params.add_special_tokens,
            truncate_prompt_tokens=params.truncate_prompt_tokens,
            truncation_side=params.truncation_side,
            cache_salt=params.cache_salt,
        )
        return [(prompt, wishes) for prompt in self._prompts.of_completion(request)]

    def _run(self, asked: list[tuple[Prompt, Wishes]]) -> list[RequestOutput]:
        run = _Run(self._engine)
        for prompt, wishes in asked:
            base = wishes.for_prompt(len(prompt.ids), self._info, "prompt")
            for sample in range(wishes.n):
                params = wishes.sample(base, sample)
                choice = Choice(sample, prompt, params, wishes, self._prompts.tokenizer)
                run.add(self._add(params, prompt.ids, prompt.hashes), choice)
        done = iter(run.finish())
        return [self._output(prompt, list(islice(done, wishes.n)), wishes) for prompt, wishes in asked]

    def _add(self, params: WorkerParams, ids: np.ndarray, hashes: bytes) -> Sid:
        """A stream of the engine's for `ids` int32 [prompt_len]."""
        self._next_sid += 1
        sid = (0, self._next_sid)
        self._engine.add(sid, params, ids, hashes)
        return sid

    def _output(self, prompt: Prompt, done: list[tuple[Choice, Delta]], wishes: Wishes) -> RequestOutput:
        outputs = [
            CompletionOutput(
                index=choice.index,
                text=delta.text,
                token_ids=delta.token_ids,
                cumulative_logprob=sum(entry.logprob for entry in delta.logprobs) if delta.logprobs else None,
                logprobs=self._logprobs(delta) if wishes.logprobs is not None else None,
                finish_reason=delta.finish_reason,
                stop_reason=delta.stop_reason,
            )
            for choice, delta in done
        ]
        ledgers = [choice.ledger for choice, _ in done]
        first = done[0][0]
        told = self._prompt_logprobs(prompt, first.prompt_logprobs)
        return RequestOutput(prompt.ids.tolist(), outputs, ledgers, first.cached_tokens, told)

    def _prompt_logprobs(self, prompt: Prompt, found: PromptLogprobs | None) -> list[dict[int, Logprob] | None] | None:
        if found is None:
            return None
        entries = zip(prompt.ids[1:].tolist(), found.entries(), strict=True)
        return [None, *(self._position(id, entry) for id, entry in entries)]

    def _logprobs(self, delta: Delta) -> list[dict[int, Logprob]]:
        return [self._position(id, entry) for id, entry in zip(delta.token_ids, delta.logprobs, strict=True)]

    def _position(self, chosen: int, entry: TokenLogprobs) -> dict[int, Logprob]:
        token = self._prompts.tokenizer.token
        best = {id: Logprob(logprob, rank, token(id)) for rank, (id, logprob) in enumerate(entry.top, 1)}
        return {chosen: Logprob(entry.logprob, entry.rank, token(chosen))} | best


class _Run:
    """The streams of one call, driven until all have ended."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._streams: dict[Sid, tuple[Choice, Delta]] = {}
        self._ledgers: dict[Sid, Ledger] = {}
        self._open: dict[Sid, Choice] = {}

    def add(self, sid: Sid, choice: Choice) -> None:
        self._streams[sid] = choice, Delta()
        self._ledgers[sid] = Ledger(stages={Stage.SUBMITTED.value: time.monotonic()})
        self._open[sid] = choice

    def finish(self) -> list[tuple[Choice, Delta]]:
        """Step until every stream has ended; what is left is aborted when one fails."""
        try:
            while self._open:
                for row in self._engine.step():
                    if row.sid in self._open:
                        self._take(row)
        finally:
            for sid in self._open:
                self._engine.abort(sid)
        return list(self._streams.values())

    def _take(self, row: Any) -> None:
        choice, delta = self._streams[row.sid]
        ledger = self._ledgers[row.sid]
        if row.ledger is not None:
            ledger.merge(row.ledger)
        output = Output()
        output.tokens, output.logprobs = list(row.tokens), list(row.logprobs)
        output.prompt_logprobs = row.prompt_logprobs
        if row.finish is not None:
            if row.finish.reason == FinishReason.ERROR:
                raise RuntimeError(row.finish.message or "the engine failed")
            ledger.stages[Stage.FINISHED.value] = time.monotonic()
            output.finished = Finished(row.sid, Outcome(row.finish.reason), ledger, row.finish.final)
        delta.extend(choice.take(output, _Stop(self, row.sid)))
        if delta.finish_reason is not None:
            self._open.pop(row.sid, None)

    def stop(self, sid: Sid) -> Finished:
        """A stop string was found."""
        self._engine.abort(sid)
        self._ledgers[sid].stages[Stage.FINISHED.value] = time.monotonic()
        return Finished(sid, Outcome.STOP, self._ledgers[sid], self._streams[sid][0].num_tokens)


class _Stop:
    """Choice's way to end its stream."""

    def __init__(self, run: _Run, sid: Sid) -> None:
        self._run, self._sid = run, sid

    def stop(self, index: int) -> Finished:
        return self._run.stop(self._sid)


def _resolve(model: str, revision: str) -> str:
    resolver = importlib.import_module("baton.worker.weights.resolve")
    try:
        return str(resolver.resolve(model, revision))
    except resolver.ResolveError as error:
        raise UserError(str(error)) from error


def _plain(prompts: PromptLike | Sequence[PromptLike]) -> Any:
    """Tuples and arrays become lists, as JSON would have them."""
    if isinstance(prompts, str):
        return prompts
    return [item if isinstance(item, str | int) else [int(id) for id in item] for item in prompts]
