"""Transport `shm`: pools live in a memfd, which the owner passes over a Unix socket and the reader maps.

    reader ── connect, Greeting ──► owner's socket (0700 directory)
    reader ◄── Greeting + memfd ─── owner              or a Refusal that names both layouts
    reader maps the memfd read-only and copies blocks; the connection stays open as a sign of life

The mapping outlives its owner, so a reader never faults on a dead peer's memory; whether what it copied still counts is
the lease's business. When the connection ends the mapping is dropped after the pull that uses it. Its page tables are
filled between pulls: all at once would hold up the first one by a tenth of a second.
"""

import ctypes
import logging
import mmap
import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np

from baton.kv_transfer.contract import Pull, PullDone, Sink, Source
from baton.proto.layout import KVLayout

log = logging.getLogger(__name__)

SCHEME = "shm:"
GREETING_BYTES = 65536
CONNECT_TIMEOUT_S = 5.0
POPULATE_BYTES = 16 * 2**20
"""Mapped between two looks at the queue: about 2 ms."""
_MADV_POPULATE_READ = 22  # Linux 5.14; on older kernels each page is mapped when it is first read

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Greeting(msgspec.Struct, frozen=True, tag=True):
    """Both sides say what their blocks look like; the owner adds who it is."""

    layout: KVLayout
    name: str
    incarnation: int
    num_blocks: int = 0


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """The owner's answer to a reader whose blocks differ."""

    reason: str


class ShmSource(Source):
    """Hands this worker's memfd to peers with the same layout."""

    def __init__(self, path: Path, me: Greeting, memfd: int) -> None:
        self.address = f"{SCHEME}{path}"
        self._path = path
        self._me = me
        self._memfd = memfd
        self._wake = os.eventfd(0)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve, name="kv-source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        self._listener.close()
        os.close(self._wake)
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(self._listener, selectors.EVENT_READ)
            try:
                while not self._stopped(selector):
                    pass
            finally:
                for key in list(selector.get_map().values()):
                    if isinstance(key.fileobj, socket.socket) and key.fileobj is not self._listener:
                        key.fileobj.close()

    def _stopped(self, selector: selectors.BaseSelector) -> bool:
        for key, _ in selector.select():
            if key.fileobj == self._wake:
                return True
            if key.fileobj is self._listener:
                connection, _address = self._listener.accept()
                connection.settimeout(CONNECT_TIMEOUT_S)
                selector.register(connection, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket) and not self._greet(key.fileobj):
                selector.unregister(key.fileobj)
                key.fileobj.close()
        return False

    def _greet(self, connection: socket.socket) -> bool:
        """Answer a reader's greeting; False when the connection is over."""
        try:
            data = connection.recv(GREETING_BYTES)
            if not data:
                return False
            peer = msgspec.msgpack.decode(data, type=Greeting)
            if reason := self._me.layout.mismatch(peer.layout):
                refusal = Refusal(f"{self._me.name} and {peer.name} can't share KV blocks: {reason}")
                log.error(refusal.reason)
                connection.send(msgspec.msgpack.encode(refusal))
                return False
            socket.send_fds(connection, [msgspec.msgpack.encode(self._me)], [self._memfd])
        except (OSError, msgspec.DecodeError) as error:
            log.warning("a reader's greeting failed: %s", error)
            return False
        return True


@dataclass(slots=True)
class _Peer:
    """A mapped pool."""

    connection: socket.socket
    mapping: mmap.mmap
    address: int
    num_blocks: int
    populated: int = 0
    """Bytes whose page-table entries are there."""

    def populate(self) -> None:
        """Map the next stretch. Through ctypes, which lets go of the interpreter lock meanwhile."""
        size = min(POPULATE_BYTES, len(self.mapping) - self.populated)
        _libc.madvise(self.address + self.populated, size, _MADV_POPULATE_READ)
        self.populated += size

    def close(self) -> None:
        self.connection.close()
        self.mapping.close()


class ShmSink(Sink):
    """Copies blocks from mapped peers' pools in a thread of its own, one pull after the other."""

    def __init__(self, me: Greeting, pool_address: int, block_bytes: int) -> None:
        self._me = me
        self._pool_address = pool_address
        self._block_bytes = block_bytes
        self._peers: dict[int, _Peer] = {}  # by the owner's incarnation
        self._queue: deque[Pull] = deque()
        self._done: deque[PullDone] = deque()
        self._done_event = os.eventfd(0, os.EFD_NONBLOCK)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-sink", daemon=True)
        self._thread.start()

    def start(self, pull: Pull) -> None:
        self._queue.append(pull)
        os.eventfd_write(self._wake, 1)

    def fileno(self) -> int:
        return self._done_event

    def completed(self) -> list[PullDone]:
        try:
            os.eventfd_read(self._done_event)
        except BlockingIOError:
            return []
        return [self._done.popleft() for _ in range(len(self._done))]

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        os.close(self._done_event)

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            while not self._closing:
                unmapped = next((peer for peer in self._peers.values() if peer.populated < len(peer.mapping)), None)
                if unmapped:
                    unmapped.populate()
                for key, _ in selector.select(0 if unmapped else None):
                    if key.fileobj == self._wake:
                        os.eventfd_read(self._wake)
                    else:
                        self._forget(key.data, selector)
                while self._queue and not self._closing:
                    self._done.append(self._pull(self._queue.popleft(), selector))
                    os.eventfd_write(self._done_event, 1)
            for incarnation in list(self._peers):
                self._forget(incarnation, selector)

    def _forget(self, incarnation: int, selector: selectors.BaseSelector) -> None:
        peer = self._peers.pop(incarnation)
        selector.unregister(peer.connection)
        peer.close()

    def _pull(self, pull: Pull, selector: selectors.BaseSelector) -> PullDone:
        try:
            peer = self._peers.get(pull.owner.incarnation)
            if peer is None:
                peer = self._connect(pull)
                self._peers[pull.owner.incarnation] = peer
                selector.register(peer.connection, selectors.EVENT_READ, pull.owner.incarnation)
            if max(pull.source) >= peer.num_blocks:
                raise ValueError(f"block {max(pull.source)} is beyond {pull.owner.worker}'s pool of {peer.num_blocks}")
        except (OSError, ValueError, msgspec.DecodeError) as error:
            return PullDone(pull.transfer, ok=False, reason=str(error), transport="shm")
        size = self._block_bytes
        for source, target, count in runs(pull.source, pull.target):
            # ctypes lets go of the interpreter lock while it copies.
            ctypes.memmove(self._pool_address + target * size, peer.address + source * size, count * size)
        return PullDone(pull.transfer, ok=True, transport="shm", num_bytes=len(pull.source) * size)

    def _connect(self, pull: Pull) -> _Peer:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.settimeout(CONNECT_TIMEOUT_S)
            connection.connect(pull.owner.kv_endpoint.removeprefix(SCHEME))
            connection.send(msgspec.msgpack.encode(self._me))
            data, descriptors, _flags, _address = socket.recv_fds(connection, GREETING_BYTES, 1)
            answer = msgspec.msgpack.decode(data, type=Greeting | Refusal)
            if isinstance(answer, Refusal):
                raise ValueError(answer.reason)
            mapping = _map_readable(descriptors[0])
            if answer.incarnation != pull.owner.incarnation:
                mapping.close()
                raise ValueError(f"{pull.owner.worker} has restarted since the pull was planned")
        except BaseException:
            connection.close()
            raise
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        return _Peer(connection, mapping, address, answer.num_blocks)


def _map_readable(memfd: int) -> mmap.mmap:
    try:
        size = os.fstat(memfd).st_size
        return mmap.mmap(memfd, size, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    finally:
        os.close(memfd)


def runs(source: tuple[int, ...], target: tuple[int, ...]) -> Iterator[tuple[int, int, int]]:
    """(source, target, count) for each stretch in which both sides' block ids count up together."""
    start = 0
    for i in range(1, len(source) + 1):
        if i == len(source) or source[i] != source[i - 1] + 1 or target[i] != target[i - 1] + 1:
            yield source[start], target[start], i - start
            start = i
