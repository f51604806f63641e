"""How two workers meet before blocks cross: each says who it is and what its blocks look like.

    reader ── connect, Greeting ──► owner              its Unix socket, or from another host its TCP endpoint
    reader ◄── Greeting ─────────── owner              with the memfd on one host; or a Refusal that names both layouts
    reader ── Attach ─────────────► owner              only for transports whose owner needs a thread for each reader
    the connection stays open as a sign of life, and the reader keeps what it has opened as long

The owner's side is source.py.
"""

import os
import select
import socket
from abc import ABC, abstractmethod
from typing import Self

import msgspec

from baton.kv_transfer.contract import TransferError
from baton.kv_transfer.line import Line
from baton.proto.address import reachable
from baton.proto.errors import UNDECODABLE
from baton.proto.layout import KVLayout
from baton.proto.messages import Peer
from baton.proto.network import Network

SCHEME = "unix:"
GREETING_BYTES = 65536
CONNECT_TIMEOUT_S = 5.0


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


class Greeted(ABC):
    """An owner that has answered, as long as it is there. Use it in a `with` block."""

    owner: Greeting
    distant: bool
    """Whether it is on another host."""
    connection: socket.socket | None = None
    """To the owner's Transport.serve; None for one on another host."""
    memfd = -1
    """The file behind the owner's pool; -1 when none came along."""

    @abstractmethod
    def fileno(self) -> int:
        """Readable when `gone` may have changed; ask `gone` before each wait."""

    @abstractmethod
    def gone(self) -> bool:
        """Whether the owner has ended, or has closed its side."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the owner."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def greet(owner: Peer, me: Greeting, network: Network) -> Greeted:
    """Connect and exchange greetings. Raises TransferError when refused, or when nobody is there."""
    endpoint = reachable(owner.kv_endpoint)
    if endpoint.startswith(SCHEME):
        return _GreetedHere(owner, me, endpoint)
    return _GreetedFar(owner, me, endpoint, network)


class _GreetedHere(Greeted):
    """Over a Unix socket."""

    distant = False

    def __init__(self, owner: Peer, me: Greeting, endpoint: str) -> None:
        self.connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            try:
                self.connection.settimeout(CONNECT_TIMEOUT_S)
                self.connection.connect(endpoint.removeprefix(SCHEME))
                self.connection.send(msgspec.msgpack.encode(me))
                data, descriptors, _flags, _address = socket.recv_fds(self.connection, GREETING_BYTES, 1)
            except OSError as error:
                raise TransferError(f"{owner.worker} does not answer at {endpoint}: {error}") from error
            self.memfd = descriptors[0] if descriptors else -1
            self.owner = _read_answer(data, owner)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        assert self.connection is not None
        return self.connection.fileno()

    def gone(self) -> bool:
        """The owner sends nothing here but what a transport waits for, so what can be read is the end."""
        return bool(select.select([self], [], [], 0)[0])

    def close(self) -> None:
        assert self.connection is not None
        self.connection.close()
        if self.memfd >= 0:
            os.close(self.memfd)


class _GreetedFar(Greeted):
    """Over TCP, with the cluster's key."""

    distant = True

    def __init__(self, owner: Peer, me: Greeting, endpoint: str, network: Network) -> None:
        self._line = Line(network, endpoint)
        try:
            try:
                self._line.send(msgspec.msgpack.encode(me))
                data = self._line.receive(CONNECT_TIMEOUT_S)[0].buffer
            except TransferError as error:
                raise TransferError(f"{owner.worker} does not answer at {endpoint}: {error}") from error
            self.owner = _read_answer(data, owner)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._line.fileno()

    def gone(self) -> bool:
        return self._line.over()

    def close(self) -> None:
        self._line.close()


def _read_answer(data: bytes | memoryview, owner: Peer) -> Greeting:
    try:
        answer = msgspec.msgpack.decode(data, type=Greeting | Refusal)
    except UNDECODABLE as error:
        raise TransferError(f"{owner.worker} gave an answer that can't be read: {error}") from error
    if isinstance(answer, Refusal):
        raise TransferError(answer.reason)
    if answer.incarnation != owner.incarnation:
        raise TransferError(f"{owner.worker} has restarted since the pull was planned")
    return answer
