"""Which tokens may come next, for the constrained rows of a step, built while the device computes the step.

    take_slot ─► begin(rows): a thread advances each stream's matcher by its last token and fills its mask
                 forward pass, meanwhile
                 finish(): Masks for the sampler

A mask is what the stream's grammar allows, within its allowed_token_ids, without the tokens that would complete one of
its bad words. A stream's state is a function of its output tokens alone: whoever takes a slot with tokens known already
(after a handoff, a preemption, a recovery) replays them. A stream whose mask depends on its last token enters a step
only once that is on the host (step_scheduler.py).
"""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from baton.proto.grammar import GrammarError
from baton.proto.messages import SamplingParams
from baton.worker.grammar_compiler import GrammarCompiler
from baton.worker.plan import Row, SlotInit

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher

BITS = 32
"""Tokens in a word of a mask."""
_MAX_THREADS = 4
_NOTHING_LEFT = "allowed_token_ids, bad_words and the output's form leave no token to go on with"


@dataclass(slots=True)
class Masks:
    """Allowed tokens of some of a step's sampled rows."""

    rows: np.ndarray
    """int64 [n], ascending indices among the sampled rows."""
    words: np.ndarray
    """int32 [n, ceil(vocab_size / 32)]: bit i of word w allows token 32 w + i. Every row allows something."""
    failed: dict[int, str] = field(default_factory=dict)
    """Of the sampled rows: why the stream can't go on."""

    def failed_rows(self, rows: Sequence[Row]) -> dict[int, str]:
        """`failed` by row of the step, for a StepResult."""
        if not self.failed:
            return {}
        sampling = [index for index, row in enumerate(rows) if row.samples]
        return {sampling[index]: message for index, message in self.failed.items()}

    def allowed(self, vocab_size: int) -> np.ndarray:
        """bool [n, vocab_size]."""
        bits = np.unpackbits(self.words.view(np.uint8), axis=1, count=vocab_size, bitorder="little")
        return bits.view(np.bool_)


class _Stream:
    """One constrained stream: what it may always draw, its matcher, and the output as far as that matters."""

    def __init__(
        self, compiled: "Future[LLMatcher] | None", params: SamplingParams, output: list[int], always: np.ndarray
    ) -> None:
        """`compiled`: of its grammar, if it has one; `always` int32 [num_words]: apart from what depends on output."""
        self.params = params
        self.always = always
        self._compiled = compiled
        self._output = output
        self._words = [word for word in params.bad_words if len(word) > 1]
        self._consumed = 0
        """Output tokens that the matcher has seen."""
        self._matcher: LLMatcher | None = None

    def append(self, row: Row) -> None:
        """Note the output tokens that this row brings."""
        new = row.output_index - len(self._output)
        if not new or not self.params.depends_on_output:
            return
        if new > len(row.tokens):
            raise AssertionError(f"a constrained stream entered a step {new} tokens ahead of what the host knows")
        self._output += row.tokens[-new:]

    def advanced(self) -> "LLMatcher | None":
        """The matcher behind the last output token; None without a grammar. Raises GrammarError."""
        if self._compiled is None:
            return None
        if self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
        new, self._consumed = self._output[self._consumed :], len(self._output)
        if new and not self._matcher.consume_tokens(new):
            raise GrammarError(f"the output has left its grammar: {self._matcher.get_error()}")
        return self._matcher

    def restrict(self, words: np.ndarray) -> None:
        """Take what it never may draw, and what would complete a bad word, out of a mask int32 [num_words]."""
        words &= self.always
        for *before, last in self._words:
            if tuple(self._output[-len(before) :]) == tuple(before):
                _clear(words, (last,))


class Constraints:
    """Masks of every slot. Owns threads; close() ends them. Not thread-safe: one caller, and its own thread."""

    def __init__(self, compiler: GrammarCompiler, vocab_size: int) -> None:
        self._compiler = compiler
        self._num_words = -(-vocab_size // BITS)
        self._all = np.full(self._num_words, -1, dtype=np.int32)
        if beyond := vocab_size % BITS:
            self._all[-1] = (1 << beyond) - 1
        self._streams: dict[int, _Stream] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: LLExecutor | None = None

    def take_slot(self, init: SlotInit) -> None:
        """A stream takes a slot, whoever had it before."""
        params = init.params
        self._streams.pop(init.slot, None)
        if not (params.grammar or params.allowed_token_ids or params.bad_words):
            return
        always = self._all.copy()
        if params.allowed_token_ids:
            always[:] = 0
            _set(always, params.allowed_token_ids)
        _clear(always, [word[0] for word in params.bad_words if len(word) == 1])
        compiled = self._compiler.matcher(params.grammar) if params.grammar else None
        self._streams[init.slot] = _Stream(compiled, params, init.tokens[init.prompt_len :], always)

    def begin(self, rows: Sequence[Row]) -> "Future[Masks] | None":
        """Start on the masks of a step with these rows; None when none of those that sample is constrained."""
        if not self._streams:
            return None
        sampling = [row for row in rows if row.samples]
        chosen = [(index, row) for index, row in enumerate(sampling) if row.slot in self._streams]
        if not chosen:
            return None
        streams = [self._streams[row.slot] for _, row in chosen]
        for stream, (_, row) in zip(streams, chosen, strict=True):
            stream.append(row)
        indices = np.array([index for index, _ in chosen], dtype=np.int64)
        return self._thread.submit(self._build, streams, indices, [row.output_index for _, row in chosen])

    def close(self) -> None:
        """End after the masks that are being built."""
        self._thread.shutdown()

    def _build(self, streams: list[_Stream], indices: np.ndarray, output_indices: list[int]) -> Masks:
        masks = Masks(indices, np.tile(self._all, (len(streams), 1)))
        matchers: dict[int, LLMatcher] = {}
        problems: dict[int, str | None] = {}
        for row, stream in enumerate(streams):
            try:
                if (matcher := stream.advanced()) is not None:
                    matchers[row] = matcher
            except GrammarError as error:
                problems[row] = str(error)
        if matchers:
            filled = self._fill(matchers, len(streams))
            for row, matcher in matchers.items():
                masks.words[row] = filled[row]
                params, output_index = streams[row].params, output_indices[row]
                problems[row] = self._settle_end(masks.words[row], matcher, params, output_index)
        for row, stream in enumerate(streams):
            stream.restrict(masks.words[row])
            if row not in matchers and output_indices[row] < stream.params.min_tokens:
                _clear(masks.words[row], stream.params.stop_token_ids)
            if problem := problems.get(row) or (None if masks.words[row].any() else _NOTHING_LEFT):
                masks.words[row] = self._all
                masks.failed[int(indices[row])] = problem
        return masks

    def _fill(self, matchers: "dict[int, LLMatcher]", count: int) -> np.ndarray:
        """What each matcher allows, apart from ends: int32 [count, num_words]."""
        from llguidance import LLExecutor
        from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

        if self._executor is None:
            self._executor = LLExecutor(num_threads=min(_MAX_THREADS, os.cpu_count() or 1))
        vocabulary = self._compiler.vocabulary  # of the model's size, or larger
        words = allocate_token_bitmask(count, vocabulary.vocab_size)
        fill_next_token_bitmask_par(self._executor, [(matcher, row) for row, matcher in matchers.items()], words)
        _clear(words.T, (vocabulary.eos_token,))
        return words[:, : self._num_words] & self._all

    def _settle_end(
        self, words: np.ndarray, matcher: "LLMatcher", params: SamplingParams, output_index: int
    ) -> str | None:
        """Allow stop tokens in `words` int32 [num_words] where the output may end, and only there.

        Where the grammar leaves nothing else it goes before min_tokens. Returns why the stream can't go on, or None.
        """
        if matcher.is_error():
            return f"the grammar is too complex: {matcher.get_error()}"
        accepting = matcher.is_accepting()
        other = words.copy()
        _clear(other, params.stop_token_ids)
        if other.any() and not (accepting and output_index >= params.min_tokens):
            words[:] = other
        elif accepting:
            _set(words, params.stop_token_ids)
        return None if words.any() else "no token of the vocabulary continues the grammar here"


def _clear(words: np.ndarray, tokens: Sequence[int]) -> None:
    """words int32 [num_words, ...]."""
    for token in tokens:
        words[token // BITS] &= ~_bit(token)


def _set(words: np.ndarray, tokens: Sequence[int]) -> None:
    for token in tokens:
        words[token // BITS] |= _bit(token)


def _bit(token: int) -> np.int32:
    return np.int32(np.uint32(1 << token % BITS).view(np.int32))
