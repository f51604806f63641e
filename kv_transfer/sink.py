"""The reader's half, whatever the transport: a thread for each peer, so that one that is slow or dead delays no other.

    start ─► the peer's queue ─► greet ─► choose a transport ─► open ─► copy what waits, in turn ─► PullDone
                                   ▲ └──── refused, gone ──────┼─────────────────┴─► PullDone(ok=False)
                                   └──── a worse one is left ──┘

A peer is opened once per incarnation. When its connection ends, what it had opened is closed after the copy that uses
it, and the thread ends; a later pull from the same peer begins anew.
"""

import contextlib
import logging
import os
import selectors
import threading
from collections import deque
from collections.abc import Callable, Sequence

from baton.kv_transfer.contract import Link, Pull, PullDone, Sink, TransferError, Transport
from baton.kv_transfer.greeting import Greeted, Greeting, greet
from baton.kv_transfer.pipeline import Pipeline
from baton.kv_transfer.topology import choose
from baton.proto.messages import KVLink
from baton.proto.network import Network

log = logging.getLogger(__name__)


class PeerSink(Sink):
    """Pulls over `transports`, the best one first."""

    def __init__(self, me: Greeting, transports: Sequence[Transport], network: Network) -> None:
        self._me = me
        self._transports = transports
        self._network = network
        self._readers: dict[int, _Reader] = {}  # by the owner's incarnation
        self._done: deque[PullDone] = deque()
        self._ready = os.eventfd(0, os.EFD_NONBLOCK)

    def start(self, pull: Pull) -> None:
        reader = self._readers.get(pull.owner.incarnation)
        if reader is None or not reader.put(pull):
            self._forget_ended()
            self._readers[pull.owner.incarnation] = _Reader(
                pull, self._me, self._transports, self._network, self._finished
            )

    def _forget_ended(self) -> None:
        for incarnation in [key for key, reader in self._readers.items() if reader.over]:
            self._readers.pop(incarnation).join()

    def fileno(self) -> int:
        return self._ready

    def completed(self) -> list[PullDone]:
        try:
            os.eventfd_read(self._ready)
        except BlockingIOError:
            return []
        return [self._done.popleft() for _ in range(len(self._done))]

    def links(self) -> tuple[KVLink, ...]:
        states = (reader.state for reader in self._readers.values())
        return tuple({state.owner: state for state in states if state is not None}.values())

    def close(self) -> None:
        for reader in self._readers.values():
            reader.stop()
        for reader in self._readers.values():
            reader.join()
        os.close(self._ready)

    def _finished(self, done: PullDone) -> None:
        """Called from the readers' threads."""
        self._done.append(done)
        os.eventfd_write(self._ready, 1)


class _Reader:
    """The pulls from one peer, in a thread of their own, which begins with the first of them."""

    def __init__(
        self,
        first: Pull,
        me: Greeting,
        transports: Sequence[Transport],
        network: Network,
        finished: Callable[[PullDone], None],
    ) -> None:
        self._owner = first.owner
        self._me = me
        self._transports = transports
        self._network = network
        self._finished = finished
        self.state: KVLink | None = None
        """The way to this owner, or why there is none: unknown at first, and once it is gone."""
        self._lock = threading.Lock()
        self._queue = deque([first])
        self._running: dict[int, Pull] = {}
        """What is being copied."""
        self._block_bytes = me.layout.groups[0].block_bytes
        self._wake = os.eventfd(0, os.EFD_NONBLOCK)
        self._stopping = False
        self.over = False
        self._thread = threading.Thread(target=self._run, name=f"kv-{self._owner.worker}", daemon=True)
        self._thread.start()

    def put(self, pull: Pull) -> bool:
        """Queue a pull; False when the thread has ended or is about to."""
        with self._lock:
            if self.over:
                return False
            self._queue.append(pull)
            os.eventfd_write(self._wake, 1)
            return True

    def stop(self) -> None:
        """End after the copy that is running; what is queued then is never answered."""
        with self._lock:
            self._stopping = True
            if not self.over:
                os.eventfd_write(self._wake, 1)

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join()

    def _run(self) -> None:
        reason = f"{self._owner.worker} has gone"
        try:
            self._read()
        except (OSError, TransferError) as error:
            reason = str(error)
        except Exception as error:
            log.exception("the transfer from %s failed", self._owner.worker)
            reason = f"{type(error).__name__}: {error}"
        self.state = None if self.state else KVLink(self._owner.worker, "", reason)
        with self._lock:
            self.over = True
            os.close(self._wake)
        for pull in (*self._running.values(), *self._queue):
            self._finished(PullDone(pull.transfer, ok=False, reason=reason))

    def _read(self) -> None:
        """Copy until the peer goes or this side stops, over the best link that can be had. Each try is a connection of
        its own: a transport that fails may have taken it over at the other end."""
        left, failures = list(self._transports), ""
        while True:
            with greet(self._owner, self._me, self._network) as greeted:
                transport, why = choose(left, greeted.owner, greeted.distant)
                try:
                    link = transport.open(greeted.owner.offers[transport.name], greeted.connection, greeted.memfd)
                except (OSError, TransferError) as error:
                    left.remove(transport)
                    if not left:
                        raise
                    failures += f"{transport.name} failed: {error}; "
                    continue
                with contextlib.closing(link):
                    self._note(transport, (failures + why).removesuffix("; "))
                    self._read_over(link, transport, greeted)
            return

    def _note(self, transport: Transport, why: str) -> None:
        level = logging.WARNING if why else logging.INFO
        reason = why or ("the best of several" if len(self._transports) > 1 else "as asked for")
        self.state = KVLink(self._owner.worker, transport.name, why)
        log.log(level, "%s reads %s through %s (%s)", self._me.name, self._owner.worker, transport.name, reason)

    def _read_over(self, link: Link, transport: Transport, greeted: Greeted) -> None:
        pipeline = Pipeline(link, self._block_bytes, greeted.owner.num_blocks)
        with selectors.DefaultSelector() as selector:
            selector.register(self._wake, selectors.EVENT_READ)
            selector.register(greeted, selectors.EVENT_READ)
            more = True
            while not (self._stopping or greeted.gone()):
                more = more and link.prepare()
                for key, _ in selector.select(0 if more or self._queue else None):
                    if key.fileobj == self._wake:
                        os.eventfd_read(self._wake)
                for pull in pipeline.copy(lambda: self._next(greeted)):
                    del self._running[pull.transfer]
                    num_bytes = len(pull.source) * self._block_bytes
                    self._finished(PullDone(pull.transfer, ok=True, transport=transport.name, num_bytes=num_bytes))

    def _next(self, greeted: Greeted) -> Pull | None:
        """Of what waits, if it is still to be copied."""
        if not self._queue or self._stopping or greeted.gone():
            return None
        pull = self._queue.popleft()
        self._running[pull.transfer] = pull
        return pull
