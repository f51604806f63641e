"""Copying blocks inside one machine, between a pool and whatever this process can address."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np

from baton.kv_transfer.contract import Pool


class Mover(ABC):
    """Copies blocks of one size between addresses."""

    @abstractmethod
    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        """Copy the blocks at source int64 [n] to target int64 [n]; returns when all are there.

        No target is named twice, so n is no more than the blocks of the pool that is written.
        """


def mover_for(pool: Pool) -> Mover:
    """Between `pool` and host memory, or a peer's memory on a GPU."""
    if pool.gpu < 0:
        return HostMover(pool.block_bytes)
    from baton.kv_transfer.gpu_mover import GpuMover

    return GpuMover(pool)


class HostMover(Mover):
    """Between addresses of the host."""

    def __init__(self, block_bytes: int) -> None:
        self._block_bytes = block_bytes

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        for from_, to, count in runs(source.tolist(), target.tolist(), self._block_bytes):
            # ctypes lets go of the interpreter lock while it copies.
            ctypes.memmove(to, from_, count * self._block_bytes)


def runs(source: list[int], target: list[int], step: int) -> Iterator[tuple[int, int, int]]:
    """(source, target, count) for each stretch in which both sides go up by `step`."""
    start = 0
    for i in range(1, len(source) + 1):
        if i == len(source) or source[i] != source[i - 1] + step or target[i] != target[i - 1] + step:
            yield source[start], target[start], i - start
            start = i
