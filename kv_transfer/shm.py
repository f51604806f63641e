"""Transport `shm`: pools live in a memfd, which comes with the owner's greeting and which the reader maps.

The mapping outlives its owner, so a reader never faults on a dead peer's memory; whether what it copied still counts is
the lease's business. Page tables are filled between pulls: all at once would hold up the first one by a tenth of a
second.
"""

import ctypes
import dataclasses
import mmap
import os
import socket

import msgspec
import numpy as np

from baton.kv_transfer.contract import Link, Pool, Transport
from baton.kv_transfer.movers import HostMover

PIECE_BYTES = 16 * 2**20
"""Copied at a time; pulls that are whole by then are answered: some 2 ms."""
POPULATE_BYTES = 16 * 2**20
"""Mapped between two looks at the queue: about 2 ms."""
_MADV_POPULATE_READ = 22  # Linux 5.14; on older kernels each page is mapped when it is first read

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class ShmOffer(msgspec.Struct, frozen=True):
    """Nothing beyond the memfd."""


class ShmTransport(Transport):
    """Between workers on CPU cores of one host."""

    name = "shm"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def offer(self) -> ShmOffer:
        return ShmOffer()

    def obstacle(self, offer: msgspec.Raw) -> str:
        return ""

    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> "ShmLink":
        return ShmLink(self._pool, memfd)


class ShmLink(Link):
    """A mapped pool."""

    piece_bytes = PIECE_BYTES
    window = 1

    def __init__(self, pool: Pool, memfd: int) -> None:
        self._pool = pool
        self._mapping = mmap.mmap(memfd, os.fstat(memfd).st_size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        self._address = np.frombuffer(self._mapping, dtype=np.uint8).ctypes.data
        self._theirs = dataclasses.replace(pool, address=self._address)
        self._mover = HostMover(pool.block_bytes)
        self._populated = 0

    def prepare(self) -> bool:
        """Map the next stretch. Through ctypes, which lets go of the interpreter lock meanwhile."""
        size = min(POPULATE_BYTES, len(self._mapping) - self._populated)
        _libc.madvise(self._address + self._populated, size, _MADV_POPULATE_READ)
        self._populated += size
        return self._populated < len(self._mapping)

    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        self._mover.move(self._theirs.addresses(source), self._pool.addresses(target))

    def end(self, index: int, target: np.ndarray) -> None:
        """It is there already."""

    def close(self) -> None:
        self._mapping.close()
