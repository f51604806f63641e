"""Transport `tcp`: blocks as ZeroMQ frames over several connections; the last resort, and never taken silently.

Frames of host pools are sent from the pool itself, without a copy; a GPU's blocks are gathered into pinned memory by
one kernel, and scattered by one. Sockets listen on the loopback interface only.
"""

import ctypes
import socket
from collections.abc import Sequence

import msgspec
import numpy as np
import zmq

from baton.kv_transfer.contract import Pool, TransferError, Transport
from baton.kv_transfer.fetch import (
    STALLED_S,
    Attached,
    FetchLink,
    Receiver,
    Sender,
    attach,
    encode_fetch,
    serve_fetches,
)
from baton.kv_transfer.movers import HostMover
from baton.kv_transfer.staging import Staging

CONNECTIONS = 2
"""Fetches take them in turn."""


class TcpOffer(msgspec.Struct, frozen=True):
    """Nothing beyond what Attached tells."""


class TcpTransport(Transport):
    """Between any two workers."""

    name = "tcp"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool

    def offer(self) -> TcpOffer:
        return TcpOffer()

    def obstacle(self, offer: msgspec.Raw) -> str:
        return ""

    def open(self, offer: msgspec.Raw, connection: socket.socket, memfd: int) -> FetchLink:
        return FetchLink(self._pool, TcpReceiver(self._pool, connection))

    def serve(self, connection: socket.socket) -> None:
        sender = TcpSender(self._pool)
        try:
            connection.send(msgspec.msgpack.encode(Attached(sender.endpoints)))
            serve_fetches(connection, self._pool, sender)
        finally:
            sender.close()


class TcpSender(Sender):
    """Listens for one reader."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._staging = Staging(pool) if pool.gpu >= 0 else None
        self._context = zmq.Context(io_threads=CONNECTIONS)
        self._sockets = [self._context.socket(zmq.PUSH) for _ in range(CONNECTIONS)]
        for each in self._sockets:
            each.setsockopt(zmq.SNDTIMEO, int(STALLED_S * 1000))
            each.bind("tcp://127.0.0.1:*")
        self.endpoints = tuple(each.getsockopt_string(zmq.LAST_ENDPOINT) for each in self._sockets)

    def send(self, index: int, blocks: np.ndarray) -> None:
        frames = [self._staging.gather(index, blocks).numpy().data] if self._staging else self._views(blocks.tolist())
        try:
            self._sockets[index % CONNECTIONS].send_multipart(frames, copy=False)
        except zmq.Again as error:
            raise TransferError(f"it has taken nothing for {STALLED_S:.0f} s") from error

    def _views(self, blocks: Sequence[int]) -> list[memoryview]:
        """The pool's own memory, a view for each stretch of blocks that lie side by side."""
        size = self._pool.block_bytes
        starts = [i for i in range(len(blocks)) if not i or blocks[i] != blocks[i - 1] + 1]
        ends = [*starts[1:], len(blocks)]
        return [
            memoryview((ctypes.c_char * ((end - start) * size)).from_address(self._pool.address + blocks[start] * size))
            for start, end in zip(starts, ends, strict=True)
        ]

    def close(self) -> None:
        # Waits until no frame refers to the pool's memory any more.
        self._context.destroy(linger=0)


class TcpReceiver(Receiver):
    """Connects to a sender's sockets."""

    def __init__(self, pool: Pool, connection: socket.socket) -> None:
        self._pool = pool
        self._connection = connection
        self._mover = HostMover(pool.block_bytes)
        self._staging = Staging(pool) if pool.gpu >= 0 else None
        self._context = zmq.Context(io_threads=CONNECTIONS)
        self._pollers: list[tuple[zmq.Socket, zmq.Poller]] = []
        for endpoint in attach(connection, TcpTransport.name).channel:
            puller = self._context.socket(zmq.PULL)
            puller.connect(endpoint)
            poller = zmq.Poller()
            poller.register(puller, zmq.POLLIN)
            poller.register(connection, zmq.POLLIN)
            self._pollers.append((puller, poller))

    def ask(self, index: int, blocks: np.ndarray, targets: np.ndarray) -> None:
        self._connection.send(encode_fetch(blocks))

    def receive(self, index: int, targets: np.ndarray) -> None:
        puller, poller = self._pollers[index % CONNECTIONS]
        ready = dict(poller.poll(int(STALLED_S * 1000)))
        if puller not in ready:
            raise TransferError("the owner has gone" if ready else f"the owner has sent nothing for {STALLED_S:.0f} s")
        frames = [np.frombuffer(frame.buffer, dtype=np.uint8) for frame in puller.recv_multipart(copy=False)]
        if sum(map(len, frames)) != len(targets) * self._pool.block_bytes:
            raise TransferError(f"{sum(map(len, frames))} bytes came instead of {len(targets)} blocks")
        if self._staging is not None:
            buffer = self._staging.buffer(index, len(targets))
            np.concatenate(frames, out=buffer.numpy())
            self._staging.scatter(buffer, targets)
            return
        size = self._pool.block_bytes
        sources = [frame.ctypes.data + np.arange(0, len(frame), size) for frame in frames]
        self._mover.move(np.concatenate(sources), targets)

    def close(self) -> None:
        self._context.destroy(linger=0)
