"""What every transport promises: whole blocks, pulled by the side that owns the destination.

A worker has one Source, which tells peers how its pool can be read, and one Sink, which fills its pool from theirs.
Between the two stand the transports: each offers the pool in its way, and opens what a peer offers as a Link.
A pull reads whatever the source blocks hold at that moment: whether that was still the right content is settled
afterwards, by the lease's owner (leases.py), and nobody uses the copy before.
"""

import socket
from abc import ABC, abstractmethod
from dataclasses import dataclass

import msgspec
import numpy as np

from baton.proto.messages import KVLink, Peer

MAX_PIECE_BLOCKS = 4096
"""So that what asks for them fits into one packet of a connection."""


@dataclass(slots=True, frozen=True, eq=False)
class Pull:
    """Copy whole blocks from a peer's pool; answered by PullDone."""

    transfer: int
    """Id, unique per batcher."""
    owner: Peer
    source: np.ndarray
    """The owner's block ids, int64 [n], n > 0."""
    target: np.ndarray
    """Ours, in the same order."""


@dataclass(slots=True, frozen=True)
class PullDone:
    """Event: the transport has finished with a Pull; no byte of it will be written any more."""

    transfer: int
    ok: bool
    reason: str = ""
    transport: str = ""
    num_bytes: int = 0


class Source(ABC):
    """The owner's half: makes this worker's pool readable."""

    address: str
    """Where peers are greeted: 'unix:/…', and 'tcp://…' besides for those on other hosts (proto/address.py)."""

    @abstractmethod
    def close(self) -> None:
        """Stop serving; returns when peers have let go of the pool, or after a bound when they don't."""


class Sink(ABC):
    """The reader's half: runs pulls beside the worker's steps and says when each has ended."""

    @abstractmethod
    def start(self, pull: Pull) -> None:
        """Begin; never blocks. Every started pull is answered by exactly one PullDone."""

    @abstractmethod
    def fileno(self) -> int:
        """Readable while `completed` has something to return."""

    @abstractmethod
    def completed(self) -> list[PullDone]:
        """Pulls that ended since the last call. No byte of their targets will be written any more."""

    @abstractmethod
    def links(self) -> tuple[KVLink, ...]:
        """How each owner is read that is there, or why it can't be."""

    @abstractmethod
    def close(self) -> None:
        """End after the pulls that are running, and let go of every peer's memory."""


@dataclass(slots=True, frozen=True)
class Pool:
    """A worker's blocks as transports see them: block i is bytes [i, i + 1) * block_bytes from `address`."""

    address: int
    num_blocks: int
    block_bytes: int
    memfd: int = -1
    """The file behind `address`; -1 for memory of a GPU."""
    gpu: int = -1
    """Index of the GPU that `address` is on; -1 for host memory."""
    handle: bytes = b""
    """By which another process maps `address`, on a GPU, where it is itself a mapping and can't be exported."""

    def addresses(self, blocks: np.ndarray) -> np.ndarray:
        """Where these blocks begin, int64 [n]."""
        return self.address + blocks.astype(np.int64, copy=False) * self.block_bytes


class TransferError(Exception):
    """Blocks can't be had from a peer; says from whom and why."""


def blocks_per_piece(block_bytes: int, num_bytes: int) -> int:
    """As many as fit, and one at least."""
    return min(max(1, num_bytes // block_bytes), MAX_PIECE_BLOCKS)


class Link(ABC):
    """A peer's pool, open for reading a piece at a time. All calls come from one thread."""

    piece_bytes: int
    """Of one piece at most, unless a block is larger."""
    edge_bytes = 0
    """Of the first piece, when nothing is under way, and about of the last: nothing crosses while those are prepared.
    0: as of all."""
    window: int
    """So many pieces are under way at most."""

    def prepare(self) -> bool:
        """Do a little of what makes later copies faster; whether more of it is left."""
        return False

    @abstractmethod
    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        """Begin to copy the owner's blocks, int64 [n], to ours, int64 [n], as piece `index`, counted from 0 as
        long as the link is open. Behind the `last` one nothing waits. Raises TransferError or OSError."""

    @abstractmethod
    def end(self, index: int, target: np.ndarray) -> None:
        """Wait until piece `index`, the oldest under way, is in our blocks, int64 [n]. Raises TransferError or
        OSError."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the peer's memory; when this returns nothing is written to the pool any more."""


class Transport(ABC):
    """One way for blocks to cross, as one worker sees it."""

    name: str
    """As in --kv-transfer, in ledgers and logs."""
    across_hosts = False
    """Whether it reaches peers on other hosts, encrypted and for holders of the cluster's key alone."""

    @abstractmethod
    def offer(self) -> msgspec.Struct:
        """What a peer needs to read this worker's pool."""

    @abstractmethod
    def obstacle(self, offer: msgspec.Raw) -> str:
        """Why this worker can't read a peer that makes this offer; empty when it can."""

    @abstractmethod
    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> Link:
        """Open the pool of the peer that makes this offer. Raises TransferError or OSError.

        The connection leads to the peer's `serve`, for transports that have one; a peer on another host has none. Both
        it and `memfd`, -1 when there is none, stay the caller's and are open as long as the link.
        """

    def serve(self, connection: socket.socket) -> None:
        """Send to one reader until its connection ends, in a thread of its own; for transports whose owner must act."""
        raise TransferError(f"{self.name} needs nothing from the owner")

    def close(self) -> None:
        """Offer the pool no longer, once no link of this side is open."""
        return
