"""Copying blocks on a GPU: one launch for any number of them, wherever both sides can be addressed from.

    (source, target) of every block ─► one copy to the device ─► one launch ─► event ─► the waiting thread goes on

Copies have a stream of their own and a bound on the multiprocessors that they take, so that steps go on beside them. A
thread waits for the event, without the interpreter lock.
"""

import numpy as np
import torch

from baton.kernels.cuda.copy import copy_blocks
from baton.kv_transfer.contract import Pool
from baton.kv_transfer.movers import Mover


class GpuMover(Mover):
    """Copies that write or read `pool`; the other side is this GPU's, a peer's or pinned host memory."""

    def __init__(self, pool: Pool) -> None:
        torch.cuda.set_device(pool.gpu)
        self._block_bytes = pool.block_bytes
        device = torch.device("cuda", pool.gpu)
        self._host_jobs = torch.empty(pool.num_blocks, 2, dtype=torch.int64, pin_memory=True)
        self._jobs = torch.empty(pool.num_blocks, 2, dtype=torch.int64, device=device)
        self._stream = torch.cuda.Stream(device)
        self._done = torch.cuda.Event()

    def move(self, source: np.ndarray, target: np.ndarray) -> None:
        host, jobs = self._host_jobs[: len(source)], self._jobs[: len(source)]
        addresses = host.numpy()
        addresses[:, 0], addresses[:, 1] = source, target
        with torch.cuda.stream(self._stream):
            jobs.copy_(host, non_blocking=True)
            copy_blocks(jobs, self._block_bytes)
            self._done.record()
        self._done.synchronize()


def warm_up(pool: Pool) -> None:
    """Compile the kernel before a request waits for it."""
    copy_blocks(torch.empty(0, 2, dtype=torch.int64, device=torch.device("cuda", pool.gpu)), pool.block_bytes)
