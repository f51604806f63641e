"""What a step costs, and how many prompt tokens it may take while streams wait for their next token.

A step's time is that of its tokens, as the first ones of their prompts, from a table measured at start; plus what they
read of the cache: `per_key` for each cached token of a decode row, `per_pair` for each pair of a prompt chunk's query
and a cached key. How hot the GPU runs and what the host adds is a factor learned from finished steps.

    streams running   the largest step within the target between two tokens
    prompts queue     larger steps compute more a second: a step may take as long as the next prompt has waited, up to
                      MOST_HURRY targets, and as much as leaves work for another one (FEW_STEPS). A long queue is
                      computed in QUEUE_STEPS steps, however long those become. One long prompt is no queue: it goes on
                      at the target's pace
    nothing running   prompts in their order until the device is full, long ones in pieces: a larger step would compute
                      hardly more a second, the first of a queue would wait for the first tokens of the others, and a
                      handoff for the whole of its transfer

`scripts/simulate_steps.py` plays the batcher against such a table, which is how the constants were chosen.
"""

from bisect import bisect_left
from collections.abc import Sequence

import msgspec

MOST_HURRY = 3.6
FEW_STEPS, FEW_LARGE_STEPS = 1.5, 2.6
"""The queued prompts are so many steps at least; the second where a step is beyond `padded_to`, a pause that every
stream notices."""
QUEUE_STEPS = 8
"""The same for a long queue, whatever the target."""
TOLERANCE = 1.06
"""A step that misses the target by less is within it: no closer are costs foreseen, and sizes are far apart."""
LEAST_PREFILL = 0.25
"""Prompts get at least this much time of a step, as a part of what its decode rows take, whatever the target."""
FULL = 0.95
"""A step that computes this part of the most prompt tokens a second fills the device."""
_LEARNING = 0.1
_FACTOR = (0.8, 2.0)


class StepCosts:
    """Seconds of steps by size. `table`: (tokens, seconds) without a cache, tokens ascending.

    Steps of up to `padded_to` tokens are filled up to a size of the table, larger ones may have any.
    """

    def __init__(self, table: Sequence[tuple[int, float]], per_key: float, per_pair: float, padded_to: int) -> None:
        self.table = list(table)
        self.per_key, self.per_pair, self.padded_to = per_key, per_pair, padded_to
        self.factor = 1.0
        self._sizes = [tokens for tokens, _ in self.table]
        rates = {tokens: tokens / seconds for tokens, seconds in self.table}
        self.best_tokens = max(rates, key=rates.__getitem__)
        """With so many a step computes the most prompt tokens a second."""
        self.full_tokens = next(tokens for tokens in rates if rates[tokens] >= FULL * rates[self.best_tokens])
        """With so many it fills the device."""

    def encode(self) -> bytes:
        """What was measured, for another process."""
        return msgspec.json.encode((self.table, self.per_key, self.per_pair, self.padded_to))

    @classmethod
    def decode(cls, data: bytes) -> "StepCosts":
        """Inverse of encode."""
        return cls(*msgspec.json.decode(data, type=tuple[list[tuple[int, float]], float, float, int]))

    def seconds(self, tokens: int, keys: int = 0, pairs: int = 0) -> float:
        """Of a step of so many tokens, whose decode rows read `keys` tokens and whose chunks make `pairs`."""
        index = min(bisect_left(self._sizes, tokens), len(self.table) - 1)
        size, seconds = self.table[index]
        if tokens > size:
            seconds *= tokens / size
        elif index and tokens > self.padded_to:
            smaller, least = self.table[index - 1]
            seconds -= (seconds - least) * (size - tokens) / (size - smaller)
        return (seconds + keys * self.per_key + pairs * self.per_pair) * self.factor

    def budget(self, rows: int, keys: int, start: int, backlog: int, waited_s: float, target_s: float) -> int:
        """Tokens of a step with `rows` decode rows over `keys` cached tokens.

        The next prompt is computed from position `start`; `backlog` prompt tokens are queued behind it, the first of
        them for `waited_s`.
        """
        allowed_s = max(target_s * TOLERANCE, self.seconds(rows, keys) * (1 + LEAST_PREFILL))
        hurried_s = max(allowed_s, min(waited_s, target_s * MOST_HURRY))
        share = backlog // QUEUE_STEPS
        best = self._sizes[min(bisect_left(self._sizes, rows + 1), len(self._sizes) - 1)]
        for size in self._sizes:
            chunk = size - rows
            few = FEW_STEPS if size <= self.padded_to else FEW_LARGE_STEPS
            limit_s = hurried_s if chunk * few <= backlog else allowed_s
            if chunk > 0 and (chunk <= share or self.seconds(size, keys, chunk * start) <= limit_s):
                best = size
        if rows + share > self.padded_to:
            best = max(best, min(rows + share, self._sizes[-1]))
        return max(best, rows + 1)

    def learn(self, expected_s: float, took_s: float) -> None:
        """A step that was to take `expected_s` took `took_s`."""
        ratio = self.factor * took_s / expected_s
        low, high = _FACTOR
        self.factor += _LEARNING * (min(max(ratio, low), high) - self.factor)
