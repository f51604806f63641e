"""Sockets as ZeroMQ gives them: ordered within a connection, silent about loss when a link is cut.

A message to an address that nobody owns is lost. A DEALER that is cut off may keep what it has for later, or lose it.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from baton.proto.messages import (
    Accepted,
    CancelCommand,
    CancelStream,
    Close,
    Confirm,
    Gone,
    Message,
    Ok,
    Open,
    PrefillDone,
    Retry,
    Settled,
    Submit,
    TokenBatch,
)

from .world import Process, World

Receive = Callable[[bytes, Message, tuple[bytes, ...]], None]

REPEATABLE = (
    *(Submit, Close, Accepted, Retry, CancelCommand, CancelStream, PrefillDone),
    *(Open, Confirm, Settled, Ok, Gone, TokenBatch),
)
"""Messages that may arrive twice without harm. Commands that start a leg are sent once."""
RETRY_S = 0.1
"""A DEALER tries to connect again this often."""


@dataclass
class Conditions:
    """How the network behaves; the fault plan changes it as time goes by."""

    delay_s: float = 0.001
    """Mean; each message draws its own, exponentially."""
    repeat: float = 0.0
    """Probability that a repeatable message arrives twice."""
    dealers_keep: bool = True
    """Whether what a DEALER has when its link is cut is delivered afterwards, or lost."""


@dataclass
class _Packet:
    source: Process
    life: int
    address: str
    sender: bytes
    message: Message
    frames: tuple[bytes, ...]
    dealer: bool


class Network:
    """All links of the simulated cluster."""

    def __init__(self, world: World) -> None:
        self.conditions = Conditions()
        self.on_send: Callable[[Message], None] = lambda message: None
        """Called with whatever is about to be sent."""
        self._world = world
        self._owners: dict[str, tuple[Process, Receive]] = {}
        self._cut: dict[frozenset[str], float] = {}
        self._last_arrival: dict[tuple[bytes, str], float] = {}
        self._kept: dict[tuple[bytes, str], deque[_Packet]] = {}

    def bind(self, owner: Process, address: str, receive: Receive) -> None:
        """Messages to this address reach `owner`."""
        self._owners[address] = (owner, receive)

    def unbind(self, owner: Process) -> None:
        """The sockets of a process are gone."""
        self._owners = {address: entry for address, entry in self._owners.items() if entry[0] is not owner}

    def cut(self, one: str, other: str, seconds: float) -> None:
        """Nothing passes between two processes for a while."""
        self._cut[frozenset((one, other))] = self._world.now + seconds

    def heal(self) -> None:
        """All links work."""
        self._cut.clear()

    def send(
        self,
        source: Process,
        address: str,
        sender: bytes,
        message: Message,
        frames: tuple[bytes, ...] = (),
        dealer: bool = False,
    ) -> None:
        """Send from the socket `sender` of a process; the same (sender, address) is one ordered connection."""
        rng = self._world.rng
        self.on_send(message)
        packet = _Packet(source, source.life, address, sender, message, frames, dealer)
        copies = 2 if isinstance(message, REPEATABLE) and rng.random() < self.conditions.repeat else 1
        for _ in range(copies):
            self._transmit(packet)

    def _transmit(self, packet: _Packet) -> None:
        key = (packet.sender, packet.address)
        delay = self._world.rng.expovariate(1 / self.conditions.delay_s)
        arrival = max(self._world.now + delay, self._last_arrival.get(key, 0.0))
        self._last_arrival[key] = arrival
        self._world.at(arrival, lambda: self._arrive(packet))

    def _arrive(self, packet: _Packet) -> None:
        key = (packet.sender, packet.address)
        if self._reachable(packet) and key not in self._kept:
            self._deliver(packet)
        elif packet.dealer and self.conditions.dealers_keep and packet.source.life == packet.life:
            if key not in self._kept:
                self._kept[key] = deque()
                self._world.at(self._world.now + RETRY_S, lambda: self._reconnect(key))
            self._kept[key].append(packet)
        else:
            self._trace(packet, "LOST")

    def _reconnect(self, key: tuple[bytes, str]) -> None:
        packets = self._kept[key]
        while packets and packets[0].source.life != packets[0].life:
            packets.popleft()
        if packets and not self._reachable(packets[0]):
            self._world.at(self._world.now + RETRY_S, lambda: self._reconnect(key))
            return
        del self._kept[key]
        for packet in packets:
            self._deliver(packet)

    def _reachable(self, packet: _Packet) -> bool:
        owner = self._owners.get(packet.address)
        if owner is None:
            return False
        return self._cut.get(frozenset((packet.source.name, owner[0].name)), 0.0) <= self._world.now

    def _deliver(self, packet: _Packet) -> None:
        owner, receive = self._owners[packet.address]
        self._trace(packet, "")
        owner.do(lambda: receive(packet.sender, packet.message, packet.frames))

    def _trace(self, packet: _Packet, note: str) -> None:
        if self._world.trace is not None:
            text = f"{packet.sender.decode()} -> {packet.address}: {packet.message} {note}"
            self._world.trace(f"{self._world.now:9.4f} {text}")
