"""Transport `nccl`: between GPUs; from a fetch to its arrival everything is put in order by the GPUs themselves.

    owner     gather i ─► send i        of fetch i; gather i + 1 runs beside send i
    reader    recv i ─► scatter i       scatter i runs beside recv i + 1

Each end has two buffers, for the fetches in turn, and two streams, one that copies and one that nccl uses; they wait
for each other by events. What the owner sends while nothing is under way is gathered on nccl's stream: fewer
calls. So the memory of a pair is bounded whatever is asked for, and the threads only enqueue.
"""

import contextlib
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import msgspec
import numpy as np
import torch

from baton.kv_transfer.contract import Link, Pool, TransferError, Transport, blocks_per_piece
from baton.kv_transfer.fetch import (
    STALLED_S,
    WINDOW,
    Attached,
    Sender,
    attach,
    encode_fetch,
    serve_fetches,
)
from baton.kv_transfer.gpu_mover import GpuMover
from baton.kv_transfer.nccl_library import Communicator, NcclError, unique_id

OWNER, READER = 0, 1
FETCH_BYTES = 128 * 2**20
"""One message: 370 us of NVLink, beside which the 20 of its own count little. Each end of a pair has BUFFERS of it."""
EDGE_BYTES = 32 * 2**20
"""95 us of NVLink: the owner's thread takes about as long until the next message is enqueued."""
BUFFERS = 2
PROGRAMS = 32
"""Of a copy beside a message, which more would slow down. The first and the last are alone and get the mover's own."""
MEETING_S = 30.0
"""The library may have to be loaded, and it looks for networks."""
SPIN_S = 0.001
POLL_S = 0.0002
"""What has no descriptor to wait for is looked at all the time for SPIN_S, then so often."""


class NcclOffer(msgspec.Struct, frozen=True):
    """Where the owner's pool is."""

    gpu: str
    """UUID."""


class NcclTransport(Transport):
    """Between different GPUs."""

    name = "nccl"

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        # Of the allocator alone: a pair's buffers are those of an ended one, and no step may still use them.
        self._memory = torch.cuda.Stream(pool.gpu)

    def offer(self) -> NcclOffer:
        return NcclOffer(self._gpu())

    def obstacle(self, offer: msgspec.Raw) -> str:
        theirs = msgspec.msgpack.decode(offer, type=NcclOffer).gpu
        return "nccl does not work between two processes on one GPU" if theirs == self._gpu() else ""

    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> "NcclLink":
        assert connection is not None  # it works within one host
        (meeting,) = attach(connection, self.name).channel
        try:
            return NcclLink(self._pool, self._memory, bytes.fromhex(meeting), connection)
        except torch.OutOfMemoryError as error:
            raise TransferError(f"no memory for its buffers: {str(error).splitlines()[0]}") from error

    def serve(self, connection: socket.socket) -> None:
        meeting = unique_id()
        connection.send(msgspec.msgpack.encode(Attached((meeting.hex(),))))
        sender = NcclSender(self._pool, self._memory, meeting, connection)
        try:
            serve_fetches(connection, self._pool, sender)
        finally:
            sender.close()

    def _gpu(self) -> str:
        return str(torch.cuda.get_device_properties(self._pool.gpu).uuid)


class _NcclEnd:
    piece_bytes = FETCH_BYTES

    def __init__(
        self, pool: Pool, memory: torch.cuda.Stream, meeting: bytes, rank: int, connection: socket.socket
    ) -> None:
        self._pool = pool
        self._connection = connection
        self._most = blocks_per_piece(pool.block_bytes, self.piece_bytes)
        self._mover = GpuMover(pool, WINDOW * self._most)
        device = self._mover.stream.device
        with torch.cuda.stream(memory):
            self._buffers = torch.empty(BUFFERS, self._most * pool.block_bytes, dtype=torch.uint8, device=device)
        self._within = np.arange(self._most) * pool.block_bytes
        # A peer waits at the other end: steps beside it must not hold nccl up.
        self._wire = torch.cuda.Stream(device, priority=-1)
        self._copied = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._crossed = [torch.cuda.Event() for _ in range(BUFFERS)]
        self._communicator = self._meet(meeting, rank)

    def _meet(self, meeting: bytes, rank: int) -> Communicator:
        """Meet the other and connect, which takes most of a second. NCCL can't be told to give that up, so a thread
        does it, which stays behind where the peer dies meanwhile."""
        met: Future[Communicator] = Future()
        with torch.cuda.stream(self._wire):
            byte = torch.empty(1, dtype=torch.uint8, device=self._wire.device)
        threading.Thread(target=_meet, args=(met, meeting, rank, byte, self._wire), name="nccl", daemon=True).start()
        try:
            with _as_transfer_error():
                self._wait(met.done, MEETING_S)
                communicator = met.result()
                crossed = torch.cuda.Event()
                crossed.record(self._wire)
                self._wait(crossed.query, STALLED_S)
        except BaseException:
            met.add_done_callback(_abort)
            raise
        return communicator

    def _wait(self, ended: Callable[[], bool], at_most_s: float) -> None:
        """Until something has ended, not beyond the peer's end."""
        began = time.monotonic()
        while not ended():
            waited = time.monotonic() - began
            readable, _, _ = select.select([self._connection], [], [], 0 if waited < SPIN_S else POLL_S)
            if readable and not self._connection.recv(1, socket.MSG_PEEK):
                raise TransferError("the peer has gone")
            if waited > at_most_s:
                raise TransferError(f"the peer stalls for {at_most_s:.0f} s")

    def _buffer(self, index: int, count: int) -> tuple[int, int, np.ndarray]:
        """Fetch `index` of `count` blocks: the address of its buffer, its bytes, and where each block lies in it."""
        address = self._buffers[index % BUFFERS].data_ptr()
        return address, count * self._pool.block_bytes, address + self._within[:count]

    def _rows(self, index: int, count: int) -> range:
        """Of the mover's list, for a fetch; the one before it there has arrived, or the reader would not ask."""
        start = index % WINDOW * self._most
        return range(start, start + count)

    def close(self) -> None:
        """End the pair and what it has under way; when this returns nothing writes to the pool any more."""
        try:
            with _as_transfer_error():
                self._communicator.abort()
        finally:
            self._mover.finish()
            self._wire.synchronize()


class NcclSender(_NcclEnd, Sender):
    """The owner's end."""

    def __init__(self, pool: Pool, memory: torch.cuda.Stream, meeting: bytes, connection: socket.socket) -> None:
        super().__init__(pool, memory, meeting, OWNER, connection)

    def send(self, index: int, blocks: np.ndarray) -> None:
        rows, (address, size, places) = self._rows(index, len(blocks)), self._buffer(index, len(blocks))
        copied, crossed = self._copied[index % BUFFERS], self._crossed[index % BUFFERS]
        if self._crossed[(index - 1) % BUFFERS].query():
            self._mover.note(rows.start, self._pool.addresses(blocks), places, self._wire)
            self._mover.launch(rows, None, self._wire)
        else:
            self._mover.note(rows.start, self._pool.addresses(blocks), places)
            self._mover.stream.wait_event(crossed)
            self._mover.launch(rows, PROGRAMS)
            copied.record(self._mover.stream)
            self._wire.wait_event(copied)
        with _as_transfer_error():
            self._communicator.send(address, size, self._wire)
        crossed.record(self._wire)


class NcclLink(_NcclEnd, Link):
    """The reader's end."""

    edge_bytes = EDGE_BYTES
    window = WINDOW

    def __init__(self, pool: Pool, memory: torch.cuda.Stream, meeting: bytes, connection: socket.socket) -> None:
        super().__init__(pool, memory, meeting, READER, connection)
        self._arrived = [torch.cuda.Event() for _ in range(WINDOW)]
        self._last_asked: tuple[int, np.ndarray, bool] | None = None

    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        # The owner takes longer over its part than this side: it hears of a fetch before the one ahead is dealt with.
        self._connection.send(encode_fetch(source))
        self._enqueue_receipt()
        self._last_asked = index, target, last

    def end(self, index: int, target: np.ndarray) -> None:
        self._enqueue_receipt()
        self._wait(self._arrived[index % WINDOW].query, STALLED_S)

    def _enqueue_receipt(self) -> None:
        """The receipt of the fetch that was asked for last."""
        if self._last_asked is None:
            return
        (index, target, last), self._last_asked = self._last_asked, None
        rows, (address, size, places) = self._rows(index, len(target)), self._buffer(index, len(target))
        copied, crossed = self._copied[index % BUFFERS], self._crossed[index % BUFFERS]
        self._wire.wait_event(copied)
        with _as_transfer_error():
            self._communicator.recv(address, size, self._wire)
        crossed.record(self._wire)
        self._mover.note(rows.start, places, self._pool.addresses(target))
        self._mover.stream.wait_event(crossed)
        self._mover.launch(rows, None if last else PROGRAMS)
        copied.record(self._mover.stream)
        self._arrived[index % WINDOW].record(self._mover.stream)


def _meet(met: Future[Communicator], meeting: bytes, rank: int, byte: torch.Tensor, wire: torch.cuda.Stream) -> None:
    """As a thread: one byte crosses. It has nothing that would be missed if it stayed for good."""
    try:
        torch.cuda.set_device(wire.device)
        communicator = Communicator(meeting, rank)
        try:
            (communicator.send if rank == OWNER else communicator.recv)(byte.data_ptr(), 1, wire)
        except NcclError:
            communicator.abort()
            raise
        met.set_result(communicator)
    except Exception as error:
        met.set_exception(error)


def _abort(met: Future[Communicator]) -> None:
    """Nobody waited for it."""
    if met.exception() is None:
        met.result().abort()


@contextlib.contextmanager
def _as_transfer_error() -> Iterator[None]:
    try:
        yield
    except NcclError as error:
        raise TransferError(f"nccl: {error}") from error
