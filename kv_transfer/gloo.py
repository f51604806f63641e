"""Transport `gloo`: torch.distributed between two workers, one process group for each pair and direction.

A group has two members, the owner (rank 0), which sends, and the reader (rank 1). It is made when the reader attaches
and ends with the connection, so workers come and go at run time, and a peer that dies ends its own pairs only. Blocks
are staged side by side in host memory and cross as one message a fetch.
"""

import contextlib
import itertools
import os
import socket
from collections import deque
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch import distributed

from baton.kv_transfer.contract import Link, Pool, TransferError, Transport
from baton.kv_transfer.fetch import (
    FETCH_BYTES,
    STALLED_S,
    WINDOW,
    Attached,
    Sender,
    attach,
    encode_fetch,
    serve_fetches,
)
from baton.kv_transfer.staging import Staging

OWNER, READER = 0, 1
STALLED = timedelta(seconds=STALLED_S)


class GlooOffer(msgspec.Struct, frozen=True):
    """Nothing beyond what Attached tells."""


class GlooTransport(Transport):
    """Between any two workers."""

    name = "gloo"

    def __init__(self, pool: Pool, folder: Path) -> None:
        """`folder` is private to this user: pairs meet through files in it."""
        self._pool = pool
        self._folder = folder
        self._numbers = itertools.count()

    def offer(self) -> GlooOffer:
        return GlooOffer()

    def obstacle(self, offer: msgspec.Raw) -> str:
        return ""

    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> "GlooLink":
        assert connection is not None  # it works within one host
        (meeting,) = attach(connection, self.name).channel
        return GlooLink(self._pool, meeting, connection)

    def serve(self, connection: socket.socket) -> None:
        meeting = self._folder / f"kv-{os.getpid()}-{id(self):x}-{next(self._numbers)}.store"
        try:
            connection.send(msgspec.msgpack.encode(Attached((str(meeting),))))
            sender = GlooSender(self._pool, str(meeting))
            try:
                serve_fetches(connection, self._pool, sender)
            finally:
                sender.close()
        finally:
            meeting.unlink(missing_ok=True)


class _GlooEnd:
    def __init__(self, pool: Pool, meeting: str, rank: int) -> None:
        self._staging = Staging(pool)
        with _as_transfer_error("gloo finds no way to the peer"):
            self._group = _make_group(meeting, rank)

    def _finish(self, work: Any) -> None:
        """Wait for an operation, no longer than STALLED_S and not beyond the peer's end."""
        with _as_transfer_error("the peer has gone, or stalls"):
            work.wait(STALLED)

    def close(self) -> None:
        """End the group; an operation that is under way fails on both sides."""
        del self._group


class GlooSender(_GlooEnd, Sender):
    """The owner's side of a pair."""

    def __init__(self, pool: Pool, meeting: str) -> None:
        super().__init__(pool, meeting, OWNER)
        self._sent: deque[Any] = deque()

    def send(self, index: int, blocks: np.ndarray) -> None:
        if len(self._sent) == WINDOW:
            self._finish(self._sent.popleft())
        self._sent.append(self._group.send([self._staging.gather(index, blocks)], READER, 0))


class GlooLink(_GlooEnd, Link):
    """The reader's side of a pair."""

    piece_bytes = FETCH_BYTES
    window = WINDOW

    def __init__(self, pool: Pool, meeting: str, connection: socket.socket) -> None:
        super().__init__(pool, meeting, READER)
        self._connection = connection

    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        self._connection.send(encode_fetch(source))

    def end(self, index: int, target: np.ndarray) -> None:
        buffer = self._staging.buffer(index, len(target))
        self._finish(self._group.recv([buffer], OWNER, 0))
        self._staging.scatter(buffer, target)


def _make_group(meeting: str, rank: int) -> Any:
    """A group of two that nobody else knows of, beside whatever groups the process has."""
    kind: Any = distributed.ProcessGroupGloo  # torch's stubs lack its options
    options = kind._Options()
    options._timeout = STALLED
    options._devices = [kind.create_device(hostname="127.0.0.1")]
    return kind(distributed.FileStore(meeting, 2), rank, 2, options)


@contextlib.contextmanager
def _as_transfer_error(what: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise TransferError(f"{what}: {str(error).splitlines()[0]}") from error
