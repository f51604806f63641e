"""Typed ZeroMQ channels: a socket, the closed union of messages it reads, and nothing else.

Sends never block. A receive drains what has arrived; whoever polls the file descriptor must drain until empty, because
ZeroMQ's descriptor is edge-triggered. A frame that does not decode is counted and logged with its sender, never guessed
at, and the process stays alive.

An identity is `name:incarnation`, so that a restarted peer is another peer. Who may connect is network.py's business.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Container, Iterator, Sequence
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from baton.proto.errors import UNDECODABLE
from baton.proto.messages import Message
from baton.proto.network import Network, Refusals

log = logging.getLogger(__name__)

M = TypeVar("M")
Frame = bytes | memoryview
Body = tuple[Frame, ...]

MAX_MESSAGE_BYTES = 256 * 2**20
"""Larger frames are refused by the socket before they are buffered."""
MAX_BACKLOG = 100_000
"""Messages kept for a peer that is connected but does not read."""
LINGER_MS = 200

_encoder = msgspec.msgpack.Encoder()


def identity(name: str, incarnation: int) -> bytes:
    """The ZeroMQ routing id of one process's socket."""
    return f"{name}:{incarnation}".encode()


class _Channel(Generic[M]):
    def __init__(self, network: Network, kind: int, reads: Any) -> None:
        self.socket = network.context.socket(kind)
        self.socket.setsockopt(zmq.LINGER, LINGER_MS)
        self.socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        self.socket.setsockopt(zmq.SNDHWM, MAX_BACKLOG)
        self.socket.setsockopt(zmq.RCVHWM, 0)
        self._decoder = msgspec.msgpack.Decoder(reads)
        self._refusals = Refusals(self.socket) if network.guarded else None
        self.malformed = 0

    def fileno(self) -> int:
        """Edge-triggered: drain after every wake-up, and once after every send."""
        return int(self.socket.getsockopt(zmq.FD))

    def readable(self) -> bool:
        """Whether a message is waiting now."""
        return bool(int(self.socket.getsockopt(zmq.EVENTS)) & zmq.POLLIN)

    def _tend(self) -> None:
        """What there is to do although nothing has arrived."""
        if self._refusals is not None:
            self._refusals.tell()

    def close(self, linger_ms: int = LINGER_MS) -> None:
        """Close the socket; unsent messages get linger_ms."""
        if self._refusals is not None:
            self._refusals.close()
        self.socket.close(linger_ms)

    @contextlib.contextmanager
    def _or_closed(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close(0)
            raise

    def _receive(self, ready: Container[object] | None) -> Iterator[list[zmq.Frame]]:
        """Parts of all messages that have arrived; none where a poller has found others ready, but not this socket."""
        self._tend()
        while ready is None or self.socket in ready:
            try:
                yield self.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return

    def _decode(self, frame: zmq.Frame, sender: str) -> M | None:
        try:
            return self._decoder.decode(frame.buffer)
        except UNDECODABLE as error:
            self.malformed += 1
            log.error("refused a message from %s: %s", sender, error)
            return None


class Dealer(_Channel[M]):
    """One connection to one peer, at the endpoint of its address that can be reached from here."""

    def __init__(self, network: Network, address: str, me: bytes, reads: Any) -> None:
        super().__init__(network, zmq.DEALER, reads)
        self.socket.setsockopt(zmq.IDENTITY, me)
        self.socket.setsockopt(zmq.RECONNECT_IVL, 50)
        self.socket.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        with self._or_closed():
            self.endpoint = network.connect(self.socket, address)
        self._backlog: deque[list[Any]] = deque()

    def send(self, message: Message, *frames: Frame) -> None:
        """Send in order; what the socket does not take now stays here until it does."""
        self._backlog.append([_encoder.encode(message), *frames])
        self.flush()

    def flush(self) -> None:
        """Hand the backlog to the socket as far as it takes it."""
        while self._backlog:
            parts = self._backlog[0]
            try:
                self.socket.send_multipart(parts, zmq.NOBLOCK, copy=sum(map(len, parts)) < 65536)
            except zmq.Again:
                return
            self._backlog.popleft()

    def _tend(self) -> None:
        super()._tend()
        self.flush()

    def drain(self, ready: Container[object] | None = None) -> Iterator[tuple[M, Body]]:
        """All messages that have arrived, with their extra frames.

        `ready`: what a poller has just found readable; to ask every socket of a loop in vain takes most of its turn.
        """
        for parts in self._receive(ready):
            message = self._decode(parts[0], self.endpoint)
            if message is not None:
                yield message, tuple(part.buffer for part in parts[1:])


class Router(_Channel[M]):
    """Many peers, each known by its identity. A send to a peer that is not connected says so."""

    def __init__(self, network: Network, address: str, reads: Any) -> None:
        super().__init__(network, zmq.ROUTER, reads)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # Who comes under an identity that is there is the same process, whose old connection has not ended here yet.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        with self._or_closed():
            self.address = network.bind(self.socket, address)
        """For peers: proto/address.py."""

    def send(self, peer: bytes, message: Message, *frames: Frame) -> bool:
        """False when the peer is gone or does not read: the caller's timers must cover the loss."""
        return self.send_encoded(peer, _encoder.encode(message), frames)

    def send_encoded(self, peer: bytes, encoded: bytes, frames: Sequence[Frame] = ()) -> bool:
        """As send, for a message that goes to several peers."""
        try:
            self.socket.send_multipart([peer, encoded, *frames], zmq.NOBLOCK, copy=sum(map(len, frames)) < 65536)
        except zmq.Again:
            log.warning("%s does not read; a message to it was dropped", peer.decode(errors="replace"))
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def drain(self, ready: Container[object] | None = None) -> Iterator[tuple[bytes, M, Body]]:
        """All messages that have arrived: (identity, message, extra frames). `ready`: as of a Dealer."""
        for parts in self._receive(ready):
            sender = parts[0].bytes
            if len(parts) < 2:
                self.malformed += 1
                continue
            message = self._decode(parts[1], sender.decode(errors="replace"))
            if message is not None:
                yield sender, message, tuple(part.buffer for part in parts[2:])


def encode(message: Message) -> bytes:
    """The first frame of a message."""
    return _encoder.encode(message)
