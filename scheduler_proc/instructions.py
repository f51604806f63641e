"""What the cluster asks its process to do. The IO loop and the simulation both carry these out."""

import logging
from dataclasses import dataclass
from enum import StrEnum

from baton.proto.channels import Frame
from baton.proto.messages import Close, Load, Message, Submit


@dataclass(slots=True, frozen=True)
class Send:
    """One message to one peer; it may be lost, and the cluster's timers cover that."""

    peer: bytes
    """The peer's ZeroMQ identity, `name:incarnation`."""
    message: Message
    frames: tuple[Frame, ...] = ()


@dataclass(slots=True, frozen=True)
class Watch:
    """Tell peer_lost when this process dies, if it can be seen from here."""

    peer: bytes
    pid: int
    pid_space: str = ""
    """Where the pid means something; empty: here."""


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

    event: Close | Submit | LoadReport | WorkerJoined | WorkerLeft


@dataclass(slots=True, frozen=True)
class Log:
    """For the operator."""

    text: str
    level: int = logging.INFO


class EventKind(StrEnum):
    """What operators may watch; the names are those of EventKind in admin.proto."""

    WORKER_JOINED = "WORKER_JOINED"
    WORKER_LEFT = "WORKER_LEFT"
    WORKER_LOST = "WORKER_LOST"
    WORKER_CHANGED = "WORKER_CHANGED"
    FRONTEND_JOINED = "FRONTEND_JOINED"
    FRONTEND_LEFT = "FRONTEND_LEFT"
    READY = "READY"
    NOT_READY = "NOT_READY"
    REQUEST_RETRIED = "REQUEST_RETRIED"
    REQUEST_CANCELLED = "REQUEST_CANCELLED"
    LINK_CHANGED = "LINK_CHANGED"


@dataclass(slots=True, frozen=True)
class Happened:
    """For whoever watches the cluster."""

    kind: EventKind
    subject: str
    """A process's name or a request's id; empty for the cluster."""
    text: str


@dataclass(slots=True, frozen=True)
class SetLogLevel:
    """For this process."""

    level: str
    """debug | info | warning | error."""


Instruction = Send | Watch | Unwatch | Observe | Log | Happened | SetLogLevel


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

    def happened(self, kind: EventKind, subject: str, text: str) -> None:
        """Append a Happened."""
        self._instructions.append(Happened(kind, subject, text))

    def take(self) -> list[Instruction]:
        """All of them, once."""
        taken, self._instructions = self._instructions, []
        return taken
