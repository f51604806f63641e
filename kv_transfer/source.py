"""The owner's half: answers the greetings of readers, and serves those transports that need it.

When the owner leaves it closes its direction of every connection on its host and waits until the readers have closed
theirs: then nobody reads its memory any more. Readers on other hosts have no hold of its memory; their connections end.
"""

import contextlib
import logging
import os
import selectors
import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
import zmq

from baton.kv_transfer.contract import Source, TransferError, Transport
from baton.kv_transfer.greeting import CONNECT_TIMEOUT_S, GREETING_BYTES, SCHEME, Attach, Greeting, Refusal
from baton.proto.errors import UNDECODABLE
from baton.proto.network import Network

log = logging.getLogger(__name__)

LET_GO_S = 1.0
"""A leaving owner gives its readers so long to end what they are copying."""


class PeerSource(Source):
    """Answers with what `transports` offer, and closes them at the end."""

    def __init__(self, path: Path, me: Greeting, transports: Sequence[Transport], memfd: int, network: Network) -> None:
        """`memfd` goes along with every answer on this host; -1 for none."""
        self._transports = transports
        self._here = _UnixDoor(path, _offering(me, transports), transports, memfd)
        self._far = None
        crossing = [each for each in transports if each.across_hosts]
        if network.spans_hosts and crossing:
            self._far = _TcpDoor(_offering(me, crossing), network)
        self.address = f"{self._here.address} {self._far.address if self._far else ''}".rstrip()

    def close(self) -> None:
        if self._far is not None:
            self._far.close()
        self._here.close()
        for transport in self._transports:
            transport.close()


def _offering(me: Greeting, transports: Sequence[Transport]) -> Greeting:
    offers = {}
    for each in transports:
        try:
            offers[each.name] = msgspec.Raw(msgspec.msgpack.encode(each.offer()))
        except TransferError as error:
            if len(transports) == 1:
                raise
            log.warning("%s is not offered: %s", each.name, error)
    return msgspec.structs.replace(me, offers=offers)


def _answer(me: Greeting, reader: Greeting) -> Greeting | Refusal:
    reason = me.layout.mismatch(reader.layout)
    if not reason:
        return me
    refusal = Refusal(f"{me.name} and {reader.name} can't share KV blocks: {reason}")
    log.error(refusal.reason)
    return refusal


class _TcpDoor:
    """Greets readers on other hosts, in a thread of its own."""

    def __init__(self, me: Greeting, network: Network) -> None:
        self._me = me
        self._wake = os.eventfd(0)
        self._router = network.context.socket(zmq.ROUTER)
        self._router.setsockopt(zmq.MAXMSGSIZE, GREETING_BYTES)
        self.address = network.bind(self._router, network.anywhere())
        self._thread = threading.Thread(target=self._serve, name="kv-far-source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """The readers' connections end with it."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        os.close(self._wake)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        poller.register(self._router, zmq.POLLIN)
        while self._wake not in dict(poller.poll()):
            reader, *rest = self._router.recv_multipart()
            try:
                greeting = msgspec.msgpack.decode(rest[0] if rest else b"", type=Greeting)
            except UNDECODABLE as error:
                log.warning("a reader's greeting failed: %s", error)
                continue
            self._router.send_multipart([reader, msgspec.msgpack.encode(_answer(self._me, greeting))])
        self._router.close(0)


class _UnixDoor:
    """Greets readers on this host, in a thread of its own, and gives each one that wants it a thread that serves it."""

    def __init__(self, path: Path, me: Greeting, transports: Sequence[Transport], memfd: int) -> None:
        self.address = f"{SCHEME}{path}"
        self._path = path
        self._me = me
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
        """Returns when readers have let go of the pool, or after a bound when they don't."""
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
            answer = _answer(self._me, peer)
            welcome = isinstance(answer, Greeting)
            descriptors = [self._memfd] if welcome and self._memfd >= 0 else []
            socket.send_fds(connection, [msgspec.msgpack.encode(answer)], descriptors)
        except (OSError, KeyError, *UNDECODABLE) as error:
            log.warning("a reader's greeting failed: %s", error)
            return False
        return welcome

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
        except (OSError, TransferError) as error:
            log.warning("a reader is served no longer: %s", error)
        except Exception:
            log.exception("a reader is served no longer")
