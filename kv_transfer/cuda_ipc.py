"""Transport `cuda_ipc`: the owner exports its pool once, the reader maps it and copies blocks with one kernel a batch.

    pulls ─► (source address, target address) of every block ─► one copy to the device ─► one launch ─► event ─► done

Works between two processes on one GPU, and between GPUs that can reach each other's memory. Copies have a stream of
their own and a bound on the multiprocessors that they take, so that decode steps go on beside them. The reader's thread
waits for the event, without the interpreter lock. Source blocks need no event: an owner names them only when the step
that wrote them has ended. Mapped memory stays valid when its owner dies, until it is closed.
"""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch

from baton.kernels.cuda.copy import copy_blocks
from baton.kv_transfer.contract import Link, Pool, Pull, TransferError, Transport
from baton.kv_transfer.cuda_memory import CudaError, ExportedMemory, MappedMemory

BATCH_BYTES = 512 * 2**20
"""Copied by one launch at most, so that the first of many pulls need not wait for the last: 0.3 ms on one GPU."""


class CudaIpcOffer(msgspec.Struct, frozen=True):
    """A pool in the memory of a GPU."""

    gpu: str
    """Its UUID: indices differ between processes."""
    handle: bytes


class CudaIpcTransport(Transport):
    """Between GPU workers of one host."""

    name = "cuda_ipc"

    def __init__(self, pool: Pool, memory: ExportedMemory) -> None:
        self._pool = pool
        self._memory = memory
        # Compiles the kernel before a request waits for it.
        copy_blocks(torch.empty(0, 2, dtype=torch.int64, device=torch.device("cuda", pool.gpu)), pool.block_bytes)

    def offer(self) -> CudaIpcOffer:
        return CudaIpcOffer(_uuid(self._pool.gpu), self._memory.handle())

    def obstacle(self, offer: msgspec.Raw) -> str:
        mine, theirs = _uuid(self._pool.gpu), msgspec.msgpack.decode(offer, type=CudaIpcOffer).gpu
        if mine == theirs:
            return ""
        index = next((i for i in range(torch.cuda.device_count()) if _uuid(i) == theirs), None)
        if index is None:
            return f"GPU {theirs} is not visible here"
        if not torch.cuda.can_device_access_peer(self._pool.gpu, index):
            return f"GPU {self._pool.gpu} can't reach the memory of GPU {index}"
        return ""

    def open(self, offer: msgspec.Raw, memfd: int) -> "CudaIpcLink":
        torch.cuda.set_device(self._pool.gpu)
        try:
            mapped = MappedMemory(msgspec.msgpack.decode(offer, type=CudaIpcOffer).handle)
        except CudaError as error:
            raise TransferError(f"the pool can't be mapped: {error}") from error
        return CudaIpcLink(self._pool, mapped)


class CudaIpcLink(Link):
    """A mapped pool, with the stream that reads it."""

    batch_bytes = BATCH_BYTES

    def __init__(self, pool: Pool, mapped: MappedMemory) -> None:
        self._pool = pool
        self._mapped = mapped
        # A batch writes no block of ours twice, so it has no more copies than we have blocks.
        self._host_jobs = torch.empty(pool.num_blocks, 2, dtype=torch.int64, pin_memory=True)
        self._jobs = torch.empty(pool.num_blocks, 2, dtype=torch.int64, device=torch.device("cuda", pool.gpu))
        self._stream = torch.cuda.Stream(pool.gpu)
        self._done = torch.cuda.Event()

    def copy(self, pulls: Sequence[Pull]) -> None:
        size = self._pool.block_bytes
        source = np.concatenate([pull.source for pull in pulls])
        target = np.concatenate([pull.target for pull in pulls])
        host, jobs = self._host_jobs[: len(source)], self._jobs[: len(source)]
        addresses = host.numpy()
        addresses[:, 0] = self._mapped.address + source * size
        addresses[:, 1] = self._pool.address + target * size
        with torch.cuda.stream(self._stream):
            jobs.copy_(host, non_blocking=True)
            copy_blocks(jobs, size)
            self._done.record()
        self._done.synchronize()

    def close(self) -> None:
        self._stream.synchronize()
        self._mapped.close()


def _uuid(gpu: int) -> str:
    return str(torch.cuda.get_device_properties(gpu).uuid)
