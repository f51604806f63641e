"""Transport `tcp`: blocks as ZeroMQ frames over several connections; the last resort, and never taken silently.

The owner answers each fetch with the blocks' bytes, from a thread that waits for no reader. Frames of host pools are
sent from the pool itself, without a copy; a GPU's blocks are gathered into pinned memory by one kernel, and scattered
by one. Between hosts the connections are TCP with the cluster's key; within one they are Unix sockets of the private
directory.
"""

import ctypes
import itertools
import logging
import os
import socket
import threading
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import zmq

from baton.kv_transfer.contract import Link, Pool, TransferError, Transport, blocks_per_piece
from baton.kv_transfer.fetch import (
    FETCH_BYTES,
    PACKET_BYTES,
    STALLED_S,
    WINDOW,
    decode_fetch,
    encode_fetch,
)
from baton.kv_transfer.line import Line
from baton.kv_transfer.movers import HostMover
from baton.kv_transfer.staging import Staging
from baton.proto.network import Network

log = logging.getLogger(__name__)

CONNECTIONS = 2
"""Fetches take them in turn."""
_numbers = itertools.count()


class TcpOffer(msgspec.Struct, frozen=True):
    """Where the owner answers."""

    addresses: tuple[str, ...]
    """One for each connection (proto/address.py)."""


class TcpTransport(Transport):
    """Between any two workers."""

    name = "tcp"
    across_hosts = True

    def __init__(self, pool: Pool, folder: Path, network: Network) -> None:
        """`folder` is private to this user. Bulk bytes get ZeroMQ threads of their own, beside those of `network`."""
        self._pool = pool
        self._folder = folder
        self._network = network.beside(io_threads=CONNECTIONS)
        self._server: TcpServer | None = None

    def offer(self) -> TcpOffer:
        if self._server is None:
            self._server = TcpServer(self._pool, self._folder, self._network)
        return TcpOffer(self._server.addresses)

    def obstacle(self, offer: msgspec.Raw) -> str:
        return ""

    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> "TcpLink":
        addresses = msgspec.msgpack.decode(offer, type=TcpOffer).addresses
        return TcpLink(self._pool, self._network, addresses)

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
        # Waits until no frame refers to the pool's memory any more.
        self._network.close()


class TcpServer:
    """Answers fetches, in a thread of its own."""

    def __init__(self, pool: Pool, folder: Path, network: Network) -> None:
        self._pool = pool
        self._at_most = blocks_per_piece(pool.block_bytes, FETCH_BYTES)
        self._wake = os.eventfd(0)
        self._sockets = [network.context.socket(zmq.ROUTER) for _ in range(CONNECTIONS)]
        for each in self._sockets:
            each.setsockopt(zmq.MAXMSGSIZE, PACKET_BYTES)
        self._paths = [folder / f"kv-{os.getpid()}-{next(_numbers)}" for _ in self._sockets]
        self.addresses = tuple(
            network.bind(each, network.everywhere(f"ipc://{path}"))
            for each, path in zip(self._sockets, self._paths, strict=True)
        )
        self._thread = threading.Thread(target=self._run, name="kv-sender", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Answer no longer; readers see the end of their connections."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        for path in self._paths:
            path.unlink(missing_ok=True)

    def _run(self) -> None:
        staging = Staging(self._pool) if self._pool.gpu >= 0 else None
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        for each in self._sockets:
            poller.register(each, zmq.POLLIN)
        while self._wake not in (ready := dict(poller.poll())):
            for each in self._sockets:
                if each in ready:
                    self._answer(each, staging)
        for each in self._sockets:
            each.close(0)

    def _answer(self, router: zmq.Socket, staging: Staging | None) -> None:
        """One fetch: the other connection, and other readers, have their turn after it."""
        reader, *rest = router.recv_multipart()
        try:
            blocks = decode_fetch(rest[0] if rest else b"", self._pool, self._at_most)
        except TransferError as error:
            log.warning("a reader is not answered: %s", error)
            return
        # A ROUTER drops what its reader does not take, or is no longer there to take; the reader gives up by itself.
        if staging is None:
            router.send_multipart([reader, *self._views(blocks.tolist())], zmq.NOBLOCK, copy=False)
        else:  # copied, so that the buffer is free for the next one, whoever it is for
            router.send_multipart([reader, staging.gather(0, blocks).numpy().data], zmq.NOBLOCK)

    def _views(self, blocks: Sequence[int]) -> list[memoryview]:
        """The pool's own memory, a view for each stretch of blocks that lie side by side."""
        size = self._pool.block_bytes
        starts = [i for i in range(len(blocks)) if not i or blocks[i] != blocks[i - 1] + 1]
        ends = [*starts[1:], len(blocks)]
        return [
            memoryview((ctypes.c_char * ((end - start) * size)).from_address(self._pool.address + blocks[start] * size))
            for start, end in zip(starts, ends, strict=True)
        ]


class TcpLink(Link):
    """Connects to a server's sockets."""

    piece_bytes = FETCH_BYTES
    window = WINDOW

    def __init__(self, pool: Pool, network: Network, addresses: Sequence[str]) -> None:
        self._pool = pool
        self._mover = HostMover(pool.block_bytes)
        self._staging = Staging(pool) if pool.gpu >= 0 else None
        self._lines: list[Line] = []
        try:
            for address in addresses:
                self._lines.append(Line(network, address))
        except BaseException:
            self.close()
            raise

    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        self._lines[index % len(self._lines)].send(encode_fetch(source))

    def end(self, index: int, target: np.ndarray) -> None:
        message = self._lines[index % len(self._lines)].receive(STALLED_S)
        frames = [np.frombuffer(frame.buffer, dtype=np.uint8) for frame in message]
        if sum(map(len, frames)) != len(target) * self._pool.block_bytes:
            raise TransferError(f"{sum(map(len, frames))} bytes came instead of {len(target)} blocks")
        if self._staging is not None:
            buffer = self._staging.buffer(index, len(target))
            np.concatenate(frames, out=buffer.numpy())
            self._staging.scatter(buffer, target)
            return
        size = self._pool.block_bytes
        sources = [frame.ctypes.data + np.arange(0, len(frame), size) for frame in frames]
        self._mover.move(np.concatenate(sources), self._pool.addresses(target))

    def close(self) -> None:
        for line in self._lines:
            line.close()
