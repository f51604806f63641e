"""How two workers meet before blocks cross: each says who it is and what its blocks look like.

    reader ── connect, Greeting ──► owner's socket (0700 directory)
    reader ◄── Greeting + memfd ─── owner              or a Refusal that names both layouts
    reader ── Attach ─────────────► owner              only for transports whose owner has to send: it starts a thread
    the connection stays open as a sign of life, and the reader keeps what it has opened as long

When the owner leaves it closes its direction of every connection and waits until the readers have closed theirs: then
nobody reads its memory any more.
"""

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import msgspec

from baton.kv_transfer.contract import Source, TransferError, Transport
from baton.proto.layout import KVLayout
from baton.proto.messages import Peer

log = logging.getLogger(__name__)

SCHEME = "unix:"
GREETING_BYTES = 65536
CONNECT_TIMEOUT_S = 5.0
LET_GO_S = 1.0
"""A leaving owner gives its readers so long to end what they are copying."""


class Greeting(msgspec.Struct, frozen=True, tag=True):
    """Both sides say who they are and what their blocks look like; the owner adds how they can be read."""

    layout: KVLayout
    name: str
    incarnation: int
    num_blocks: int = 0
    offers: dict[str, msgspec.Raw] = {}
    """Transport -> what it needs, as the transport encodes it. A reader passes over names that it does not know."""


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """The owner's answer to a reader whose blocks differ."""

    reason: str


class Attach(msgspec.Struct, frozen=True, tag=True):
    """The reader wants the owner to send through this transport; all further messages are the transport's own."""

    transport: str


class GreetingSource(Source):
    """Answers greetings with what `transports` offer, in a thread of its own."""

    def __init__(self, path: Path, me: Greeting, transports: Sequence[Transport], memfd: int) -> None:
        """`memfd` goes along with every answer; -1 for none."""
        self.address = f"{SCHEME}{path}"
        self._path = path
        offers = {each.name: msgspec.Raw(msgspec.msgpack.encode(each.offer())) for each in transports}
        self._me = msgspec.structs.replace(me, offers=offers)
        self._memfd = memfd
        self._transports = {each.name: each for each in transports}
        self._serving: list[tuple[socket.socket, threading.Thread]] = []
        self._wake = os.eventfd(0)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind(str(path))
        self._listener.listen()
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wake, selectors.EVENT_READ)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._serve, name="kv-source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)
        self._path.unlink(missing_ok=True)

    def _serve(self) -> None:
        with self._selector:
            while not self._stopped(self._selector.select()):
                pass
            self._selector.unregister(self._listener)
            self._selector.unregister(self._wake)
            self._listener.close()
            self._say_goodbye()

    def _stopped(self, events: list[tuple[selectors.SelectorKey, int]]) -> bool:
        for key, _ in events:
            if key.fileobj == self._wake:
                return True
            if key.fileobj is self._listener:
                connection, _address = self._listener.accept()
                connection.settimeout(CONNECT_TIMEOUT_S)
                self._connections.add(connection)
                self._selector.register(connection, selectors.EVENT_READ)
            elif isinstance(key.fileobj, socket.socket) and not self._answer(key.fileobj):
                self._drop(key.fileobj)
        return False

    def _answer(self, connection: socket.socket) -> bool:
        """Answer what a reader says; False when the connection is over."""
        try:
            data = connection.recv(GREETING_BYTES)
            if not data:
                return False
            peer = msgspec.msgpack.decode(data, type=Greeting | Attach)
            if isinstance(peer, Attach):
                self._attach(connection, self._transports[peer.transport])
                return True
            if reason := self._me.layout.mismatch(peer.layout):
                refusal = Refusal(f"{self._me.name} and {peer.name} can't share KV blocks: {reason}")
                log.error(refusal.reason)
                connection.send(msgspec.msgpack.encode(refusal))
                return False
            descriptors = [self._memfd] if self._memfd >= 0 else []
            socket.send_fds(connection, [msgspec.msgpack.encode(self._me)], descriptors)
        except (OSError, KeyError, msgspec.DecodeError) as error:
            log.warning("a reader's greeting failed: %s", error)
            return False
        return True

    def _attach(self, connection: socket.socket, transport: Transport) -> None:
        """Leave the connection to a thread that serves it."""
        self._selector.unregister(connection)
        self._connections.remove(connection)
        thread = threading.Thread(target=_serve_reader, args=(transport, connection), name="kv-sender", daemon=True)
        self._serving = [(each, running) for each, running in self._serving if running.is_alive()]
        self._serving.append((connection, thread))
        thread.start()

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        self._connections.remove(connection)
        connection.close()

    def _say_goodbye(self) -> None:
        for connection in (*self._connections, *(each for each, _ in self._serving)):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + LET_GO_S
        while self._connections and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(left):
                assert isinstance(key.fileobj, socket.socket)
                self._drop(key.fileobj)
        for _, thread in self._serving:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = len(self._connections) + sum(thread.is_alive() for _, thread in self._serving)
        if late:
            log.warning("%d readers have not let go of the KV pool within %.0f s", late, LET_GO_S)
        for connection in list(self._connections):
            self._drop(connection)
        for connection, thread in self._serving:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()


def _serve_reader(transport: Transport, connection: socket.socket) -> None:
    with connection:
        try:
            transport.serve(connection)
        except (OSError, TransferError, msgspec.DecodeError) as error:
            log.warning("a reader is served no longer: %s", error)
        except Exception:
            log.exception("a reader is served no longer")


@dataclass(frozen=True)
class Greeted:
    """An owner that has answered. Its connection is readable, with nothing to read, once it is gone."""

    owner: Greeting
    connection: socket.socket
    memfd: int
    """-1 when none came along."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        if self.memfd >= 0:
            os.close(self.memfd)


def greet(owner: Peer, me: Greeting) -> Greeted:
    """Connect and exchange greetings. Raises TransferError when refused, OSError when nobody is there."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(CONNECT_TIMEOUT_S)
        connection.connect(owner.kv_endpoint.removeprefix(SCHEME))
        connection.send(msgspec.msgpack.encode(me))
        data, descriptors, _flags, _address = socket.recv_fds(connection, GREETING_BYTES, 1)
    except OSError as error:
        connection.close()
        raise TransferError(f"{owner.worker} does not answer at {owner.kv_endpoint}: {error}") from error
    memfd = descriptors[0] if descriptors else -1
    try:
        answer = msgspec.msgpack.decode(data, type=Greeting | Refusal)
        if isinstance(answer, Refusal):
            raise TransferError(answer.reason)
        if answer.incarnation != owner.incarnation:
            raise TransferError(f"{owner.worker} has restarted since the pull was planned")
    except BaseException as error:
        connection.close()
        if memfd >= 0:
            os.close(memfd)
        if isinstance(error, msgspec.DecodeError):
            raise TransferError(f"{owner.worker} gave an answer that can't be read: {error}") from error
        raise
    return Greeted(answer, connection, memfd)
