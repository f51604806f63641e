"""Which tokens a grammar allows next, for the constrained rows of a step, built while the device computes the step.

    take_slot ─► begin(rows): a thread advances each stream's matcher by its last token and fills its mask
                 forward pass, meanwhile
                 finish(): Masks for the sampler

A stream's state is a function of its output tokens alone: whoever takes a slot with tokens known already (after a
handoff, a preemption, a recovery) replays them. A constrained stream enters a step only once its last token is on the
host (step_scheduler.py), because the mask depends on it.
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
    """One constrained stream: its matcher, and how much of the output it has seen."""

    def __init__(self, compiled: "Future[LLMatcher]", params: SamplingParams, output: list[int]) -> None:
        self.params = params
        self._compiled = compiled
        self._output = output
        """Not yet given to the matcher."""
        self._known = len(output)
        self._matcher: LLMatcher | None = None

    def append(self, row: Row) -> None:
        """Note the output tokens that this row brings."""
        new = row.output_index - self._known
        if new > len(row.tokens):
            raise AssertionError(f"a constrained stream entered a step {new} tokens ahead of what the host knows")
        if new:
            self._output += row.tokens[-new:]
            self._known = row.output_index

    def advanced(self) -> "LLMatcher":
        """The matcher behind the last output token. Raises GrammarError."""
        if self._matcher is None:
            self._matcher = self._compiled.result().deep_copy()
        output, self._output = self._output, []
        if output and not self._matcher.consume_tokens(output):
            raise GrammarError(f"the output has left its grammar: {self._matcher.get_error()}")
        return self._matcher


class Constraints:
    """Grammar state of every slot. Owns threads; close() ends them. Not thread-safe: one caller, and its own thread."""

    def __init__(self, compiler: GrammarCompiler, vocab_size: int) -> None:
        self._compiler = compiler
        self._num_words = -(-vocab_size // BITS)
        self._vocab_size = vocab_size
        self._streams: dict[int, _Stream] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._executor: LLExecutor | None = None

    def take_slot(self, init: SlotInit) -> None:
        """A stream takes a slot, whoever had it before."""
        self._streams.pop(init.slot, None)
        if init.params.grammar:
            compiled = self._compiler.matcher(init.params.grammar)
            self._streams[init.slot] = _Stream(compiled, init.params, init.tokens[init.prompt_len :])

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
        masks = Masks(indices, np.full((len(streams), self._num_words), -1, dtype=np.int32))
        matchers: dict[int, LLMatcher] = {}
        for row, stream in enumerate(streams):
            try:
                matchers[row] = stream.advanced()
            except GrammarError as error:
                masks.failed[int(indices[row])] = str(error)
        if not matchers:
            return masks
        filled = self._fill(matchers, len(streams))
        for row, matcher in matchers.items():
            masks.words[row] = filled[row]
            problem = self._settle_end(masks.words[row], matcher, streams[row].params, output_indices[row])
            if problem:
                masks.words[row] = -1
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
        words = words[:, : self._num_words]
        if beyond := self._vocab_size % BITS:
            words[:, -1] &= (1 << beyond) - 1
        return words

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
