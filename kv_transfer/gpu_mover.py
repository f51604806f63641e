"""Copying blocks on a GPU: one launch for any number of them, wherever both sides can be addressed from.

    (source, target) of every block ─► one copy to the device ─► one launch ─► event ─► the waiting thread goes on

Copies have a stream of their own and a bound on the multiprocessors that they take, so that steps go on beside them. A
thread waits for the event, without the interpreter lock.
"""

import numpy as np
import torch

from baton.kernels.cuda.copy import PROGRAMS, copy_blocks, prepare_copy
from baton.kv_transfer.contract import Pool
from baton.kv_transfer.cuda_memory import enqueue_upload
from baton.kv_transfer.movers import Mover

ROW_BYTES = 16
"""Of the list of what is to be copied: two addresses."""


class GpuMover(Mover):
    """Copies that write or read `pool`; the other side is this GPU's, a peer's or pinned host memory.

    For one thread, whose device it sets to the pool's.
    """

    def __init__(self, pool: Pool, blocks: int = 0, programs: int = PROGRAMS) -> None:
        """For a list of so many blocks, 0: the whole pool; a launch takes a multiprocessor for each program."""
        torch.cuda.set_device(pool.gpu)
        self._copy = prepare_copy(pool.block_bytes)
        self._programs = programs
        device = torch.device("cuda", pool.gpu)
        shape = (blocks or pool.num_blocks, 2)
        self._pinned = torch.empty(shape, dtype=torch.int64, pin_memory=True)
        self._host_list = self._pinned.numpy()
        self.stream = torch.cuda.Stream(device)
        with torch.cuda.stream(self.stream):  # memory that a step still reads may be free to other streams' allocations
            self._list = torch.empty(shape, dtype=torch.int64, device=device)
        self._done = torch.cuda.Event()

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        self.note(0, source, target)
        self.launch(range(len(source)))
        self.finish()

    def note(self, row: int, source: np.ndarray, target: np.ndarray, stream: torch.cuda.Stream | None = None) -> None:
        """Enqueue what blocks are to be copied, in rows of the list from this on that no copy under way needs; on the
        mover's stream, or another."""
        count, offset = len(source), row * ROW_BYTES
        self._host_list[row : row + count, 0], self._host_list[row : row + count, 1] = source, target
        device, host = self._list.data_ptr() + offset, self._pinned.data_ptr() + offset
        enqueue_upload(device, host, count * ROW_BYTES, (stream or self.stream).cuda_stream)

    def launch(self, rows: range, programs: int | None = None, stream: torch.cuda.Stream | None = None) -> None:
        """Enqueue the copy of these rows of the list, behind their `note`; by other than the usual number of
        programs."""
        first = self._list.data_ptr() + rows.start * ROW_BYTES
        self._copy(first, len(rows), programs or self._programs, (stream or self.stream).cuda_stream)

    def finish(self) -> None:
        """Wait for all that is enqueued."""
        self._done.record(self.stream)
        self._done.synchronize()


def warm_up(pool: Pool) -> None:
    """Compile the kernel before a request waits for it."""
    copy_blocks(torch.empty(0, 2, dtype=torch.int64, device=torch.device("cuda", pool.gpu)), pool.block_bytes)
