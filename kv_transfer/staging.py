"""Host memory in which a pair's blocks lie side by side on their way, WINDOW buffers in turn."""

import numpy as np
import torch

from baton.kv_transfer.contract import Pool, blocks_per_piece
from baton.kv_transfer.fetch import FETCH_BYTES, WINDOW
from baton.kv_transfer.movers import mover_for


class Staging:
    """`buffers`: WINDOW tensors uint8 [bytes of a fetch], pinned for a GPU's pool."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._mover = mover_for(pool)
        size = blocks_per_piece(pool.block_bytes, FETCH_BYTES) * pool.block_bytes
        self.buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=pool.gpu >= 0) for _ in range(WINDOW)]

    def gather(self, index: int, blocks: np.ndarray) -> torch.Tensor:
        """Blocks of the pool, int32 [n], side by side in the buffer of fetch `index`."""
        buffer = self.buffers[index % WINDOW][: len(blocks) * self._pool.block_bytes]
        self._mover.move(self._pool.addresses(blocks), self._inside(buffer))
        return buffer

    def buffer(self, index: int, count: int) -> torch.Tensor:
        """Room for so many blocks of fetch `index`."""
        return self.buffers[index % WINDOW][: count * self._pool.block_bytes]

    def scatter(self, buffer: torch.Tensor, blocks: np.ndarray) -> None:
        """What lies side by side in a buffer, to these blocks of the pool, int64 [n]."""
        self._mover.move(self._inside(buffer), self._pool.addresses(blocks))

    def _inside(self, buffer: torch.Tensor) -> np.ndarray:
        return buffer.data_ptr() + np.arange(0, len(buffer), self._pool.block_bytes)
