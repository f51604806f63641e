"""Hidden states to one vector per stream, for requests that want that instead of tokens.

A prompt's chunks come step by step; what is to be averaged is summed up in the stream's slot until its last chunk. A
last token's vector is the average over one. Whoever takes a slot starts from zero, also after a preemption.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from baton.worker.plan import Row, SlotInit

_TOKENS_AT_ONCE = 1024
"""Hidden states that are widened to float64 at a time."""


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Which of a step's tokens are pooled, and which vectors are complete with it."""

    tokens: np.ndarray
    """int64 [n], indices among the step's tokens."""
    slots: np.ndarray
    """int64 [n], whose sum each token goes into."""
    done: np.ndarray
    """int64 [m], rows of the step whose vector is complete."""
    done_slots: np.ndarray
    """int64 [m]."""
    divisors: np.ndarray
    """int64 [m]: tokens in each sum."""

    @classmethod
    def of(cls, rows: Sequence[Row], query_start: np.ndarray) -> "PooledRows | None":
        """Those of a plan, whose row r ends before token query_start[r + 1]; None when nothing is pooled."""
        pooled = [index for index, row in enumerate(rows) if row.pools]
        if not pooled:
            return None
        ends = query_start[1:][pooled]
        counts = np.array([rows[index].pools for index in pooled])
        first = np.concatenate([[0], np.cumsum(counts)[:-1]])
        tokens = np.arange(counts.sum()) + np.repeat(ends - counts - first, counts)
        done = [index for index in pooled if rows[index].mean_of]
        return cls(
            tokens=tokens.astype(np.int64),
            slots=np.repeat(np.array([rows[index].slot for index in pooled], dtype=np.int64), counts),
            done=np.array(done, dtype=np.int64),
            done_slots=np.array([rows[index].slot for index in done], dtype=np.int64),
            divisors=np.array([rows[index].mean_of for index in done], dtype=np.int64),
        )


class Pooler:
    """The sums of all slots: float64 [num_slots, hidden_size], so that they don't show how a prompt was cut.

    They exist from the first request for a vector: 32 MiB for 1,024 slots of 4,096 numbers.
    """

    def __init__(self, num_slots: int, hidden_size: int, device: torch.device) -> None:
        self._shape, self._device = (num_slots, hidden_size), device
        self._slots: set[int] = set()
        """Whose last stream wanted a vector."""
        self._fresh: list[int] = []
        """Taken since something was pooled: their sums are still those of others."""

    def take_slot(self, init: SlotInit) -> None:
        """A stream takes a slot, whoever had it before."""
        if init.params.pooling:
            self._slots.add(init.slot)
            self._fresh.append(init.slot)
        elif self._slots:
            self._slots.discard(init.slot)

    @cached_property
    def _sums(self) -> torch.Tensor:
        return torch.zeros(self._shape, dtype=torch.float64, device=self._device)

    def rows(self, rows: Sequence[Row], query_start: np.ndarray) -> "PooledRows | None":
        """As PooledRows.of, without a look at the rows where nobody wants a vector."""
        return PooledRows.of(rows, query_start) if self._slots else None

    def pool(self, rows: PooledRows, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [len(rows.tokens), hidden_size], after the last norm -> the vectors that are complete, float32
        [len(rows.done), hidden_size], on the device."""
        if self._fresh:
            self._sums.index_fill_(0, self._upload(np.array(self._fresh, dtype=np.int64)), 0.0)
            self._fresh.clear()
        parts = zip(self._upload(rows.slots).split(_TOKENS_AT_ONCE), hidden.split(_TOKENS_AT_ONCE), strict=True)
        for slots, part in parts:
            self._sums.index_add_(0, slots, part.double())
        vectors = self._sums[self._upload(rows.done_slots)] / self._upload(rows.divisors)[:, None]
        return vectors.float()

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type == "cpu":
            return tensor
        # Through pinned memory, which torch keeps until the copy is over: a pageable copy would wait for the GPU.
        return tensor.pin_memory().to(self._device, non_blocking=True)


def to_rows(rows: PooledRows, vectors: torch.Tensor) -> dict[int, bytes]:
    """Vectors float32 [len(rows.done), hidden_size] on the host, for a StepResult."""
    return {row: vector.tobytes() for row, vector in zip(rows.done.tolist(), vectors.numpy(), strict=True)}
