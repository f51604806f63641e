"""What the cluster asks its process to do. The IO loop and the simulation both carry these out."""

import logging
from dataclasses import dataclass

from baton.proto.channels import Frame
from baton.proto.messages import Close, Load, Message, Retry


@dataclass(slots=True, frozen=True)
class Send:
    """One message to one peer; it may be lost, and the cluster's timers cover that."""

    peer: bytes
    """The peer's ZeroMQ identity, `name:incarnation`."""
    message: Message
    frames: tuple[Frame, ...] = ()


@dataclass(slots=True, frozen=True)
class Watch:
    """Tell peer_lost when this local process dies."""

    peer: bytes
    pid: int


@dataclass(slots=True, frozen=True)
class Unwatch:
    """The peer is gone or said goodbye; its pid may be reused."""

    peer: bytes


@dataclass(slots=True, frozen=True)
class WorkerJoined:
    """A worker registered: its series start at 0."""

    worker: str
    role: str


@dataclass(slots=True, frozen=True)
class WorkerLeft:
    """A worker was lost or said goodbye: its gauges end."""

    worker: str
    role: str


@dataclass(slots=True, frozen=True)
class LoadReport:
    """A worker's figures; its counters count from the start of this incarnation."""

    worker: str
    incarnation: int
    role: str
    load: Load


@dataclass(slots=True, frozen=True)
class Observe:
    """For the metrics."""

    event: Close | Retry | LoadReport | WorkerJoined | WorkerLeft


@dataclass(slots=True, frozen=True)
class Log:
    """For the operator."""

    text: str
    level: int = logging.INFO


Instruction = Send | Watch | Unwatch | Observe | Log


class Outbox:
    """Instructions of the event at hand, in order."""

    def __init__(self) -> None:
        self._instructions: list[Instruction] = []

    def add(self, instruction: Instruction) -> None:
        """Append one."""
        self._instructions.append(instruction)

    def send(self, peer: bytes, message: Message, frames: tuple[Frame, ...] = ()) -> None:
        """Append a Send."""
        self._instructions.append(Send(peer, message, frames))

    def log(self, text: str, level: int = logging.INFO) -> None:
        """Append a Log."""
        self._instructions.append(Log(text, level))

    def take(self) -> list[Instruction]:
        """All of them, once."""
        taken, self._instructions = self._instructions, []
        return taken
