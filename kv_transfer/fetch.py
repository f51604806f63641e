"""What transports share whose owner has to send: the reader asks for a few blocks at a time.

    reader ── Attach ─────────► owner              a thread for this reader
    reader ◄── Attached ─────── owner              where the bytes will come from
    reader ── Fetch(blocks) ──► owner              at most WINDOW of them unanswered
    reader ◄══ the blocks' bytes, over the transport's own channel, in the order of the fetches

`tcp` has only the last two, over sockets of its own.

The window bounds memory on both sides: a staging buffer is used again WINDOW fetches later, when the reader is known to
have what was in it. Bytes of a pair flow one way only, so that no order of two sides' transfers can deadlock.
"""

import collections
import socket
from abc import ABC, abstractmethod
from collections.abc import Sequence

import msgspec
import numpy as np

from baton.kv_transfer.contract import Link, Pool, Pull, TransferError
from baton.kv_transfer.greeting import Attach

WINDOW = 4
FETCH_BYTES = 4 * 2**20
MAX_FETCH_BLOCKS = 4096
"""So that a Fetch fits into one packet of the connection."""
STALLED_S = 5.0
"""A peer that sends or takes nothing for so long, while it should, is given up."""
PACKET_BYTES = 65536


class Attached(msgspec.Struct, frozen=True):
    """The owner's answer to Attach."""

    channel: tuple[str, ...]
    """Addresses, as the transport understands them."""


class Fetch(msgspec.Struct, frozen=True, array_like=True):
    """Send these blocks, in this order."""

    blocks: tuple[int, ...]


class Sender(ABC):
    """The owner's end of a channel. All calls come from one thread."""

    @abstractmethod
    def send(self, index: int, blocks: Sequence[int]) -> None:
        """Begin to send these blocks as fetch `index`; those before index - WINDOW + 1 have arrived."""

    @abstractmethod
    def close(self) -> None:
        """Drop what has not been sent."""


class Receiver(ABC):
    """The reader's end."""

    @abstractmethod
    def ask(self, index: int, blocks: Sequence[int]) -> None:
        """Ask for these blocks as fetch `index`; at most WINDOW fetches have not been received."""

    @abstractmethod
    def receive(self, index: int, targets: np.ndarray) -> None:
        """Wait for fetch `index` and put its blocks at these addresses, int64 [n].

        Raises TransferError or OSError when the owner is gone or stalls.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the channel."""


def blocks_per_fetch(pool: Pool) -> int:
    """As many as fit into FETCH_BYTES, and one at least."""
    return min(max(1, FETCH_BYTES // pool.block_bytes), MAX_FETCH_BLOCKS)


def encode_fetch(blocks: Sequence[int]) -> bytes:
    """The reader's question."""
    return msgspec.msgpack.encode(Fetch(tuple(blocks)))


def decode_fetch(data: bytes | memoryview, pool: Pool) -> tuple[int, ...]:
    """The blocks that a reader asks for. Raises TransferError or msgspec.DecodeError when it must not."""
    blocks = msgspec.msgpack.decode(data, type=Fetch).blocks
    if not 0 < len(blocks) <= blocks_per_fetch(pool) or not 0 <= min(blocks) <= max(blocks) < pool.num_blocks:
        raise TransferError(f"a reader asks for {len(blocks)} blocks up to {max(blocks, default=-1)}")
    return blocks


def attach(connection: socket.socket, transport: str) -> Attached:
    """Ask the owner to serve this connection."""
    connection.send(msgspec.msgpack.encode(Attach(transport)))
    data = connection.recv(PACKET_BYTES)
    if not data:
        raise TransferError("the owner has closed the connection instead of serving it")
    return msgspec.msgpack.decode(data, type=Attached)


def serve_fetches(connection: socket.socket, pool: Pool, sender: Sender) -> None:
    """Answer a reader until it goes."""
    connection.settimeout(None)
    index = 0
    while data := connection.recv(PACKET_BYTES):
        sender.send(index, decode_fetch(data, pool))
        index += 1


class FetchLink(Link):
    """A peer that sends what it is asked for."""

    batch_bytes = WINDOW * FETCH_BYTES

    def __init__(self, pool: Pool, receiver: Receiver) -> None:
        self._pool = pool
        self._receiver = receiver
        self._asked = self._received = 0

    def copy(self, pulls: Sequence[Pull]) -> None:
        source = [block for pull in pulls for block in pull.source]
        targets = self._pool.addresses([block for pull in pulls for block in pull.target])
        step = blocks_per_fetch(self._pool)
        awaited: collections.deque[slice] = collections.deque()
        for start in range(0, len(source), step):
            if len(awaited) == WINDOW:
                self._receive(targets[awaited.popleft()])
            piece = slice(start, start + step)
            self._receiver.ask(self._asked, source[piece])
            self._asked += 1
            awaited.append(piece)
        for piece in awaited:
            self._receive(targets[piece])

    def _receive(self, targets: np.ndarray) -> None:
        self._receiver.receive(self._received, targets)
        self._received += 1

    def close(self) -> None:
        self._receiver.close()
