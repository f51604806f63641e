"""What transports share whose owner has to send: the reader asks for a few blocks at a time.

    reader ── Attach ─────────► owner              a thread for this reader
    reader ◄── Attached ─────── owner              where the bytes will come from
    reader ── fetch ──────────► owner              blocks, int32 [n], little-endian; at most WINDOW of them unanswered
    reader ◄══ the blocks' bytes, over the transport's own channel, in the order of the fetches

`tcp` has only the last two, over sockets of its own.

The window bounds memory on both sides: a staging buffer is used again WINDOW fetches later, when the reader is known to
have what was in it. Bytes of a pair flow one way only, so that no order of two sides' transfers can deadlock.
"""

import socket
from abc import ABC, abstractmethod

import msgspec
import numpy as np

from baton.kv_transfer.contract import Pool, TransferError, blocks_per_piece
from baton.kv_transfer.greeting import Attach

WINDOW = 4
FETCH_BYTES = 4 * 2**20
"""What a channel through host memory asks for at a time; nccl has its own measure."""
STALLED_S = 5.0
"""A peer that sends or takes nothing for so long, while it should, is given up."""
PACKET_BYTES = 65536


class Attached(msgspec.Struct, frozen=True):
    """The owner's answer to Attach."""

    channel: tuple[str, ...]
    """Addresses, as the transport understands them."""


class Sender(ABC):
    """The owner's end of a channel. All calls come from one thread."""

    piece_bytes = FETCH_BYTES
    """A fetch asks for no more, unless one block is larger; the link's is the same."""

    @abstractmethod
    def send(self, index: int, blocks: np.ndarray) -> None:
        """Begin to send these blocks, int32 [n], as fetch `index`; those before index - WINDOW + 1 have arrived."""

    @abstractmethod
    def close(self) -> None:
        """Drop what has not been sent."""


def encode_fetch(blocks: np.ndarray) -> bytes:
    """The reader's question: send these blocks, int [n], in this order."""
    return blocks.astype("<i4").tobytes()


def decode_fetch(data: bytes | memoryview, pool: Pool, at_most: int) -> np.ndarray:
    """The blocks that a reader asks for, int32 [n]. Raises TransferError when it must not."""
    if not data or len(data) % 4:
        raise TransferError(f"a reader asks for blocks with {len(data)} bytes")
    blocks = np.frombuffer(data, dtype="<i4")
    if not 0 < len(blocks) <= at_most or blocks.view("<u4").max() >= pool.num_blocks:  # a negative one is larger
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
    index, at_most = 0, blocks_per_piece(pool.block_bytes, sender.piece_bytes)
    while data := connection.recv(PACKET_BYTES):
        sender.send(index, decode_fetch(data, pool, at_most))
        index += 1
