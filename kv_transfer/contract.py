"""What every transport promises: whole blocks, pulled by the side that owns the destination.

A worker has one Source, which serves its own pool, and one Sink per transport in use, which fills its pool from peers'.
The source half exists because some transports need the owner to act; with shared memory it only hands out the mapping.
A pull reads whatever the source blocks hold at that moment: whether that was still the right content is settled
afterwards, by the lease's owner (leases.py), and nobody uses the copy before.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from baton.proto.messages import Peer


@dataclass(slots=True, frozen=True)
class Pull:
    """Copy whole blocks from a peer's pool; answered by PullDone."""

    transfer: int
    """Id, unique per batcher."""
    owner: Peer
    source: tuple[int, ...]
    """The owner's block ids."""
    target: tuple[int, ...]
    """Ours, in the same order."""


@dataclass(slots=True, frozen=True)
class PullDone:
    """Event: the transport has finished with a Pull; no byte of it will be written any more."""

    transfer: int
    ok: bool
    reason: str = ""
    transport: str = ""
    num_bytes: int = 0


class Source(ABC):
    """The owner's half: makes this worker's pool readable."""

    address: str
    """What peers pass to their sink: 'shm:/…'."""

    @abstractmethod
    def close(self) -> None:
        """Stop serving; what peers have mapped stays readable to them until they let go."""


class Sink(ABC):
    """The reader's half: runs pulls beside the worker's steps and says when each has ended."""

    @abstractmethod
    def start(self, pull: Pull) -> None:
        """Begin; never blocks. Every started pull is answered by exactly one PullDone."""

    @abstractmethod
    def fileno(self) -> int:
        """Readable while `completed` has something to return."""

    @abstractmethod
    def completed(self) -> list[PullDone]:
        """Pulls that ended since the last call. No byte of their targets will be written any more."""

    @abstractmethod
    def close(self) -> None:
        """End after the pull that is running, and let go of every peer's memory."""
