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

from baton.kv_transfer.contract import Link, Pool, Pull, TransferError, in_pieces
from baton.kv_transfer.greeting import Attach

WINDOW = 4
FETCH_BYTES = 4 * 2**20
"""What a channel through host memory asks for at a time; nccl has its own measure."""
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

    blocks: bytes
    """int32 [n], little-endian."""


class Sender(ABC):
    """The owner's end of a channel. All calls come from one thread."""

    fetch_bytes = FETCH_BYTES
    """A fetch asks for no more, unless one block is larger; the receiver's is the same."""

    @abstractmethod
    def send(self, index: int, blocks: np.ndarray) -> None:
        """Begin to send these blocks, int32 [n], as fetch `index`; those before index - WINDOW + 1 have arrived."""

    @abstractmethod
    def close(self) -> None:
        """Drop what has not been sent."""


class Receiver(ABC):
    """The reader's end. All calls come from one thread."""

    fetch_bytes = FETCH_BYTES
    edge_bytes = 0
    """Of the first and the last fetch of a pull: nothing crosses while those are gathered or scattered. 0: as all."""

    @abstractmethod
    def ask(self, index: int, blocks: np.ndarray, targets: np.ndarray) -> None:
        """Ask for blocks, int64 [n], as fetch `index`, to be put at these addresses, int64 [n].

        At most WINDOW fetches have not been received.
        """

    @abstractmethod
    def receive(self, index: int, targets: np.ndarray) -> None:
        """Wait for fetch `index` and put its blocks at these addresses, int64 [n].

        Raises TransferError or OSError when the owner is gone or stalls.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of the channel."""


def blocks_per_fetch(pool: Pool, fetch_bytes: int) -> int:
    """As many as fit, and one at least."""
    return min(max(1, fetch_bytes // pool.block_bytes), MAX_FETCH_BLOCKS)


def fetch_sizes(count: int, most: int, edge: int) -> list[int]:
    """How many of `count` blocks each fetch asks for, `most` at most. If edge is not 0, the first asks for so many and
    each of the next for four times as many as the one before, and the last ones likewise: so none waits long until its
    blocks are gathered, and the end until they are scattered."""
    ends: list[int] = []
    while 0 < edge < most and 3 * edge <= count - 2 * sum(ends):
        ends.append(edge)
        edge *= 4
    inner = count - 2 * sum(ends)
    number = -(-inner // most)
    return [*ends, *(inner * (i + 1) // number - inner * i // number for i in range(number)), *reversed(ends)]


def encode_fetch(blocks: np.ndarray) -> bytes:
    """The reader's question."""
    return msgspec.msgpack.encode(Fetch(blocks.astype("<i4").tobytes()))


def decode_fetch(data: bytes | memoryview, pool: Pool, at_most: int) -> np.ndarray:
    """The blocks that a reader asks for, int32 [n]. Raises TransferError, or one of UNDECODABLE, when it must not."""
    asked = msgspec.msgpack.decode(data, type=Fetch).blocks
    blocks = np.frombuffer(asked[: len(asked) // 4 * 4], dtype="<i4")
    if not 0 < len(blocks) <= at_most or not 0 <= blocks.min() <= blocks.max() < pool.num_blocks:
        raise TransferError(f"a reader asks for {len(blocks)} blocks up to {blocks.max(initial=-1)}")
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
    index, at_most = 0, blocks_per_fetch(pool, sender.fetch_bytes)
    while data := connection.recv(PACKET_BYTES):
        sender.send(index, decode_fetch(data, pool, at_most))
        index += 1


class FetchLink(Link):
    """A peer that sends what it is asked for."""

    def __init__(self, pool: Pool, receiver: Receiver) -> None:
        self._pool = pool
        self._receiver = receiver
        self.batch_bytes = WINDOW * receiver.fetch_bytes
        self._most = blocks_per_fetch(pool, receiver.fetch_bytes)
        self._edge = blocks_per_fetch(pool, receiver.edge_bytes) if receiver.edge_bytes else 0
        self._asked: collections.deque[tuple[int, np.ndarray]] = collections.deque()
        self._index = 0

    def copy(self, pulls: Sequence[Pull]) -> None:
        count = sum(len(pull.source) for pull in pulls)
        for source, target in in_pieces(pulls, fetch_sizes(count, self._most, self._edge)):
            if len(self._asked) == WINDOW:
                self._receiver.receive(*self._asked.popleft())
            targets = self._pool.addresses(target)
            self._receiver.ask(self._index, source, targets)
            self._asked.append((self._index, targets))
            self._index += 1
        while self._asked:
            self._receiver.receive(*self._asked.popleft())

    def close(self) -> None:
        self._receiver.close()
