"""A model whose next token is a pure function of the prefix, computed only through what the KV blocks hold.

The KV of a position is a number made of the token and of everything stored before it, so a wrong, stale or overwritten
block anywhere before a token changes that token's outcome.

A token is an outcome and noise. Without noise a stream is the same whoever computes it. With noise each worker and
attempt draws other tokens, as a sampler without fixed seeds would: then a stream that goes on from tokens of another
attempt than those delivered has outcomes that do not follow from its prefix, and so shows that it was spliced.

A hidden state is what a position sees, all of it; the vector of a request that wants one is the sum of those pooled.
"""

import struct
from collections.abc import Sequence

import numpy as np

from baton.proto.lifecycle import Pooling
from baton.worker.plan import Row, StepPlan, StepResult

OUTCOMES = 61
NOISE = 16
STOP_TOKENS = tuple(range(NOISE))
"""Outcome 0 ends a stream."""
_MASK = (1 << 64) - 1


def _mix(a: int, b: int) -> int:
    x = (a * 0x9E3779B97F4A7C15 + b * 0xC2B2AE3D27D4EB4F + 0x165667B19E3779F9) & _MASK
    x ^= x >> 29
    x = x * 0xBF58476D1CE4E5B9 & _MASK
    return x ^ x >> 32


class Memory:
    """The bytes of a worker's pool: per block and slot one number."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.blocks = [[0] * block_size for _ in range(num_blocks)]

    def context(self, block_table: Sequence[int], length: int) -> tuple[int, int]:
        """What attention over `length` positions sees: (of the full blocks, of the last partial one)."""
        full, rest = divmod(length, self.block_size)
        seen = 0
        for block in block_table[:full]:
            seen = _mix(seen, sum(self.blocks[block]))
        return seen, sum(self.blocks[block_table[full]][:rest]) if rest else 0

    def append(
        self, block_table: Sequence[int], start: int, tokens: Sequence[int], hidden: list[int] | None = None
    ) -> int:
        """Write the KV of tokens at positions from `start`; returns the outcome that follows.

        `hidden` gets the hidden state of each.
        """
        seen, partial = self.context(block_table, start)
        for position, token in enumerate(tokens, start):
            index, slot = divmod(position, self.block_size)
            value = _mix(seen ^ partial, token)
            self.blocks[block_table[index]][slot] = value
            partial += value
            if slot == self.block_size - 1:
                seen, partial = _mix(seen, sum(self.blocks[block_table[index]])), 0
            if hidden is not None:
                hidden.append(seen ^ partial)
        return _mix(seen ^ partial, 0xBA70) % OUTCOMES


def prompt_outcomes(
    memory: Memory, block_table: Sequence[int], start: int, tokens: Sequence[int], targets: Sequence[int]
) -> bytes:
    """Append tokens one by one. PromptLogprobs.data without alternatives, of the targets that follow the first of them:
    an outcome stands for the log-probability, and the token itself for its rank."""
    outcomes = [memory.append(block_table, start + i, [token]) for i, token in enumerate(tokens)]
    return np.array(list(zip(outcomes, targets, strict=False)), dtype=np.int32).tobytes()


class Reference:
    """An undisturbed stream over a pool of its own, one token at a time."""

    def __init__(self, prompt: Sequence[int], max_tokens: int, block_size: int) -> None:
        num_blocks = -(-(len(prompt) + max_tokens) // block_size)
        self._memory = Memory(num_blocks, block_size)
        self._length = len(prompt)
        self.prompt_logprobs = prompt_outcomes(self._memory, range(num_blocks), 0, prompt[:-1], prompt[1:])
        """What must be told of the prompt to those who ask."""
        self.next = self._memory.append(range(num_blocks), len(prompt) - 1, prompt[-1:])
        """The outcome that must follow what was appended."""

    def append(self, token: int) -> None:
        """The stream went on with this token."""
        self.next = self._memory.append(range(len(self._memory.blocks)), self._length, [token])
        self._length += 1


def pack_vector(total: int, tokens: int) -> bytes:
    """A vector: the sum of so many hidden states."""
    return struct.pack("<QQ", total & _MASK, tokens)


def reference_vector(prompt: Sequence[int], pooling: str, block_size: int) -> bytes:
    """What a prompt's vector must be."""
    memory = Memory(-(-len(prompt) // block_size), block_size)
    hidden: list[int] = []
    memory.append(range(len(memory.blocks)), 0, prompt, hidden)
    pooled = hidden[-1:] if pooling == Pooling.LAST else hidden
    return pack_vector(sum(pooled), len(pooled))


class Runner:
    """Executes step plans on a Memory, as worker/model_runner.py does on tensors."""

    def __init__(self, memory: Memory, noise: int) -> None:
        """`noise` of 0 is none; else it should differ between workers."""
        self._memory = memory
        self._noise = noise
        self._tables: dict[int, list[int]] = {}
        self._last_token: dict[int, int] = {}
        self._attempt: dict[int, int] = {}
        self._sums: dict[int, int] = {}

    def execute(self, plan: StepPlan, started_s: float, sampled_s: float) -> StepResult:
        """One step. All rows read and write the pool now."""
        for init in plan.new_slots:
            self._tables[init.slot] = list(init.block_table)
            self._last_token[init.slot] = init.tokens[-1]
            self._attempt[init.slot] = init.attempt
            self._sums[init.slot] = 0
        for source, target in plan.copies:
            self._memory.blocks[target][:] = self._memory.blocks[source]
        told: dict[int, bytes] = {}
        vectors: dict[int, bytes] = {}
        tokens = []
        for index, row in enumerate(plan.rows):
            if row.targets:
                table = [*self._tables[row.slot], *row.new_blocks]
                told[index] = prompt_outcomes(self._memory, table, row.start, row.tokens, row.targets)
            tokens.append(self._execute(index, row, vectors))
        return StepResult(plan.step, tokens, {}, started_s, sampled_s, prompt_logprobs=told, vectors=vectors)

    def _execute(self, index: int, row: Row, vectors: dict[int, bytes]) -> list[int]:
        table = self._tables[row.slot]
        table += row.new_blocks
        known = [self._last_token[row.slot]] if row.from_device else row.tokens
        hidden: list[int] | None = [] if row.pools else None
        outcome = self._memory.append(table, row.start, known, hidden)
        if hidden is not None:
            self._sums[row.slot] += sum(hidden[-row.pools :])
        if row.mean_of:
            vectors[index] = pack_vector(self._sums[row.slot], row.mean_of)
        if not row.samples:
            return []
        noise = _mix(self._noise, self._attempt[row.slot] << 32 | row.output_index) if self._noise else 0
        token = outcome * NOISE + noise % NOISE
        self._last_token[row.slot] = token
        return [token]
