"""Transports `gloo` and `nccl`: torch.distributed between two workers, one process group for each pair and direction.

A group has two members, the owner (rank 0), which sends, and the reader (rank 1). It is made when the reader attaches
and ends with the connection, so workers come and go at run time, and a peer that dies ends its own pairs only. Blocks
are staged side by side, in host memory for gloo and on the GPU for nccl, and cross as one message a fetch.
"""

import contextlib
import itertools
import os
import select
import socket
import time
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from torch import distributed

from baton.kv_transfer.contract import Pool, TransferError, Transport
from baton.kv_transfer.fetch import (
    STALLED_S,
    WINDOW,
    Attached,
    FetchLink,
    Receiver,
    Sender,
    attach,
    encode_fetch,
    serve_fetches,
)
from baton.kv_transfer.staging import Staging

OWNER, READER = 0, 1
NEVER = timedelta(days=1)
POLL_S = 0.0002
"""How often an operation of nccl, which has no descriptor to wait for, is looked at."""


class DistributedOffer(msgspec.Struct, frozen=True):
    """Where the owner's pool is."""

    gpu: str
    """UUID; empty for host memory."""


class DistributedTransport(Transport):
    """Between any two workers with gloo, between different GPUs with nccl."""

    def __init__(self, backend: str, pool: Pool, folder: Path) -> None:
        """`folder` is private to this user: pairs meet through files in it."""
        self.name = backend
        self._pool = pool
        self._folder = folder
        self._numbers = itertools.count()
        if backend == "nccl":
            # By default torch ends the whole process when one operation fails or stalls; here only its pair ends.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            os.environ.setdefault("TORCH_NCCL_ENABLE_MONITORING", "0")

    def offer(self) -> DistributedOffer:
        return DistributedOffer(self._gpu())

    def obstacle(self, offer: msgspec.Raw) -> str:
        theirs = msgspec.msgpack.decode(offer, type=DistributedOffer).gpu
        if self.name == "nccl" and theirs == self._gpu():
            return "nccl does not work between two processes on one GPU"
        return ""

    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> FetchLink:
        assert connection is not None  # it works within one host
        (meeting,) = attach(connection, self.name).channel
        return FetchLink(self._pool, DistributedReceiver(self.name, self._pool, meeting, connection))

    def serve(self, connection: socket.socket) -> None:
        meeting = self._folder / f"kv-{os.getpid()}-{id(self):x}-{next(self._numbers)}.store"
        try:
            connection.send(msgspec.msgpack.encode(Attached((str(meeting),))))
            sender = DistributedSender(self.name, self._pool, str(meeting), connection)
            try:
                serve_fetches(connection, self._pool, sender)
            finally:
                sender.close()
        finally:
            meeting.unlink(missing_ok=True)

    def _gpu(self) -> str:
        return "" if self._pool.gpu < 0 else str(torch.cuda.get_device_properties(self._pool.gpu).uuid)


class _Pair:
    """A process group of two with its staging buffers."""

    def __init__(self, backend: str, pool: Pool, meeting: str, rank: int, connection: socket.socket) -> None:
        self._backend = backend
        self._connection = connection
        self._staging = Staging(pool, on_gpu=backend == "nccl")
        with _as_transfer_error(f"{backend} finds no way to the peer"):
            self._group = _make_group(backend, meeting, rank)

    def _finish(self, work: Any) -> None:
        """Wait for an operation, no longer than STALLED_S and not beyond the peer's end."""
        if self._backend == "gloo":
            with _as_transfer_error("the peer has gone, or stalls"):
                work.wait(timedelta(seconds=STALLED_S))
            return
        deadline = time.monotonic() + STALLED_S
        while not work.is_completed():
            gone, _, _ = select.select([self._connection], [], [], POLL_S)
            if time.monotonic() > deadline or (gone and not self._connection.recv(1, socket.MSG_PEEK)):
                self._group.abort()
                raise TransferError("the peer has gone" if gone else f"the peer stalls for {STALLED_S:.0f} s")

    def close(self) -> None:
        """End the group; an operation that is under way fails on both sides."""
        if self._backend == "nccl":
            self._group.abort()
        del self._group


class DistributedSender(_Pair, Sender):
    """The owner's side of a pair."""

    def __init__(self, backend: str, pool: Pool, meeting: str, connection: socket.socket) -> None:
        super().__init__(backend, pool, meeting, OWNER, connection)
        self._sent: deque[Any] = deque()

    def send(self, index: int, blocks: Sequence[int]) -> None:
        if len(self._sent) == WINDOW:
            self._finish(self._sent.popleft())
        buffer = self._staging.gather(index, blocks)
        self._sent.append(self._group.send([buffer], READER, 0))


class DistributedReceiver(_Pair, Receiver):
    """The reader's side of a pair."""

    def __init__(self, backend: str, pool: Pool, meeting: str, connection: socket.socket) -> None:
        super().__init__(backend, pool, meeting, READER, connection)

    def ask(self, index: int, blocks: Sequence[int]) -> None:
        self._connection.send(encode_fetch(blocks))

    def receive(self, index: int, targets: np.ndarray) -> None:
        buffer = self._staging.buffer(index, len(targets))
        self._finish(self._group.recv([buffer], OWNER, 0))
        self._staging.scatter(buffer, targets)


def _make_group(backend: str, meeting: str, rank: int) -> Any:
    """A group of two that nobody else knows of, beside whatever groups the process has."""
    # torch's stubs lack the options of either.
    kind: Any = distributed.ProcessGroupGloo if backend == "gloo" else distributed.ProcessGroupNCCL
    options = kind._Options() if backend == "gloo" else kind.Options()
    # gloo keeps the deadline itself; for nccl _Pair does, and torch must not come first.
    options._timeout = timedelta(seconds=STALLED_S) if backend == "gloo" else NEVER
    if backend == "gloo":
        options._devices = [kind.create_device(hostname="127.0.0.1")]
    return kind(distributed.FileStore(meeting, 2), rank, 2, options)


@contextlib.contextmanager
def _as_transfer_error(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TransferError(f"{what}: {str(error).splitlines()[0]}") from error
