"""Transport `cuda_ipc`: the owner exports its pool once, the reader maps it and copies blocks with a kernel.

Works between two processes on one GPU, and between GPUs that can reach each other's memory. Source blocks need no
event: an owner names them only when the step that wrote them has ended. Mapped memory stays valid when its owner dies,
until it is closed.
"""

import dataclasses
import socket

import msgspec
import numpy as np
import torch

from baton.kernels.cuda.copy import PEER_PROGRAMS, PROGRAMS
from baton.kv_transfer.contract import Link, Pool, TransferError, Transport, blocks_per_piece
from baton.kv_transfer.cuda_memory import CudaError, MappedMemory, export
from baton.kv_transfer.gpu_mover import GpuMover, warm_up

LAUNCH_BYTES = 512 * 2**20
"""One launch, at most, so that the first of many pulls need not wait for the last: 0.3 ms on one GPU."""
LAUNCH_BLOCKS = 1024
"""Of one launch: while these are copied, the addresses of the next are worked out."""
WINDOW = 4
"""Launches under way; each has rows of the list and an event of its own."""


class CudaIpcOffer(msgspec.Struct, frozen=True):
    """A pool in the memory of a GPU."""

    gpu: str
    """Its UUID: indices differ between processes."""
    handle: bytes


class CudaIpcTransport(Transport):
    """Between GPU workers of one host."""

    name = "cuda_ipc"

    def __init__(self, pool: Pool) -> None:
        """`pool` lies in ExportedMemory, or has a handle."""
        self._pool = pool
        warm_up(pool)

    def offer(self) -> CudaIpcOffer:
        try:
            return CudaIpcOffer(_uuid(self._pool.gpu), self._pool.handle or export(self._pool.address))
        except CudaError as error:
            raise TransferError(f"the pool can't be exported: {error}") from error

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

    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> "CudaIpcLink":
        owner = msgspec.msgpack.decode(offer, type=CudaIpcOffer)
        programs = PROGRAMS if owner.gpu == _uuid(self._pool.gpu) else PEER_PROGRAMS
        try:
            return CudaIpcLink(self._pool, owner.handle, programs)
        except CudaError as error:
            raise TransferError(f"the pool can't be mapped: {error}") from error


class CudaIpcLink(Link):
    """A mapped pool."""

    window = WINDOW
    launch_blocks = LAUNCH_BLOCKS

    def __init__(self, pool: Pool, handle: bytes, programs: int) -> None:
        self._pool = pool
        self.piece_bytes = min(LAUNCH_BYTES, self.launch_blocks * pool.block_bytes)
        self._most = blocks_per_piece(pool.block_bytes, self.piece_bytes)
        self._mover = GpuMover(pool, WINDOW * self._most, programs)
        self._mapped = MappedMemory(handle)
        self._theirs = dataclasses.replace(pool, address=self._mapped.address)
        self._copied = [torch.cuda.Event() for _ in range(WINDOW)]

    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        row = index % WINDOW * self._most
        self._mover.note(row, self._theirs.addresses(source), self._pool.addresses(target))
        self._mover.launch(range(row, row + len(source)))
        self._copied[index % WINDOW].record(self._mover.stream)

    def end(self, index: int, target: np.ndarray) -> None:
        self._copied[index % WINDOW].synchronize()

    def close(self) -> None:
        self._mover.finish()  # where a copy has failed halfway
        self._mapped.close()


def _uuid(gpu: int) -> str:
    return str(torch.cuda.get_device_properties(gpu).uuid)
