"""What a keeper decides: who may load, which memory there is, whose the blocks are. Messages in, instructions out.

    TakeTurn ─► waits ─► Turn ─► Allocate, Filled, Note ─► EndTurn        one process after the other
                                                     └──► Join ─► Share ─► Swap, Withdraw ─► Swapped

A process is waited for until every earlier one of its name is gone, and gone means reaped by the kernel: until then its
steps may still run on the device and write its blocks. What a process had begun and not finished in its turn is undone
when it dies, so the next one begins anew.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

from baton.keeper.shares import Shares
from baton.proto.messages import (
    Allocate,
    Allocated,
    EndTurn,
    Filled,
    Join,
    Memory,
    Message,
    Note,
    Prompts,
    Share,
    Swap,
    Swapped,
    TakeTurn,
    ToKeeper,
    Turn,
    Withdraw,
)


class OutOfMemoryError(Exception):
    """The device has less than was asked for; says how much."""


class Allocator(ABC):
    """Memory of one device that other processes can map."""

    @abstractmethod
    def allocate(self, num_bytes: int) -> bytes:
        """Zeroed memory; what maps it. Raises OutOfMemoryError."""

    @abstractmethod
    def free(self, handle: bytes) -> None:
        """Give it back; processes that have it mapped keep it."""


@dataclass(frozen=True, slots=True)
class Send:
    """Send to a worker."""

    peer: bytes
    message: Message
    frames: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Watch:
    """Call `gone` when this process has ended, at once if it has already."""

    peer: bytes
    pid: int


Instruction = Send | Watch


class Keeper:
    """The memory of one device. `parts`: worker -> its part of the pool's blocks, which sum to 1."""

    def __init__(self, allocator: Allocator, parts: Mapping[str, float]) -> None:
        self._allocator = allocator
        self._parts = parts
        self._shared_pool = os.urandom(8).hex()
        self.memories: dict[str, Memory] = {}
        self._notes: dict[str, bytes] = {}
        self.shares: Shares | None = None
        self._prompts: dict[str, float] = {}  # worker -> since when its steps compute prompts
        self._workers: dict[bytes, str] = {}  # living processes, in the order in which they came
        self._waiting: list[bytes] = []
        self.turn: bytes | None = None

    def handle(self, sender: bytes, message: ToKeeper) -> list[Instruction]:
        """One message of a process; those of one that is gone come too late."""
        if isinstance(message, TakeTurn):
            return self._arrive(sender, message)
        if sender not in self._workers:
            return []
        match message:
            case Allocate():
                return [Send(sender, self._allocate(message))]
            case Filled():
                memory = self.memories[message.key]
                self.memories[message.key] = Memory(memory.num_bytes, memory.handle, ready=True)
            case Note():
                self._notes[message.key] = message.data
            case EndTurn() if sender == self.turn:
                return self._end_turn()
            case Join():
                return self._join(sender, message)
            case Swap():
                return self._swap(message)
            case Withdraw():
                assert self.shares is not None
                self.shares.withdraw(message)
                return [Send(sender, Swapped(message.owner_incarnation, message.lease, done=False))]
            case Prompts():
                return self._has_prompts(self._workers[sender], message.since)
        return []

    def gone(self, sender: bytes) -> list[Instruction]:
        """A process has ended, and with it all that it ran on the device."""
        worker = self._workers.pop(sender, None)
        if worker is None:
            return []
        if self.shares is not None and worker not in self._workers.values():
            self.shares.leave(worker)
        if sender in self._waiting:
            self._waiting.remove(sender)
        told = self._has_prompts(worker, None)
        return told + (self._end_turn() if sender == self.turn else self._next_turn())

    def _arrive(self, sender: bytes, message: TakeTurn) -> list[Instruction]:
        if sender in self._workers or message.worker not in self._parts:
            return []
        self._workers[sender] = message.worker
        self._waiting.append(sender)
        return [Watch(sender, message.pid), *self._next_turn()]

    def _end_turn(self) -> list[Instruction]:
        for key in [key for key, memory in self.memories.items() if not memory.ready]:
            self._allocator.free(self.memories.pop(key).handle)
        self.turn = None
        return self._next_turn()

    def _next_turn(self) -> list[Instruction]:
        first = {worker: sender for sender, worker in reversed(self._workers.items())}
        able = [sender for sender in self._waiting if first[self._workers[sender]] == sender]
        if self.turn is not None or not able:
            return []
        self.turn = able[0]
        self._waiting.remove(self.turn)
        return [Send(self.turn, Turn(os.getpid(), self._shared_pool, dict(self.memories), dict(self._notes)))]

    def _allocate(self, message: Allocate) -> Allocated:
        try:
            handle = self._allocator.allocate(message.num_bytes)
        except OutOfMemoryError as error:
            return Allocated(None, str(error))
        memory = self.memories[message.key] = Memory(message.num_bytes, handle, ready=message.num_blocks > 0)
        if message.num_blocks:
            self.shares = Shares(message.num_blocks, self._parts)
        return Allocated(memory)

    def _join(self, sender: bytes, message: Join) -> list[Instruction]:
        assert self.shares is not None
        worker = self._workers[sender]
        share = Send(sender, Share(), (self.shares.join(worker, message.incarnation).tobytes(),))
        others = self._oldest_prompt(worker)
        told = [] if others is None else [Send(sender, Prompts(others))]
        return [share, *told, *self._has_prompts(worker, None)]

    def _has_prompts(self, worker: str, since: float | None) -> list[Instruction]:
        """All the others hear of the oldest prompt that is not their own."""
        if since == self._prompts.get(worker):
            return []
        if since is None:
            del self._prompts[worker]
        else:
            self._prompts[worker] = since
        others = [(sender, other) for sender, other in self._workers.items() if other != worker]
        return [Send(sender, Prompts(self._oldest_prompt(other))) for sender, other in others]

    def _oldest_prompt(self, worker: str) -> float | None:
        """When it came, of all that other workers compute."""
        return min((since for owner, since in self._prompts.items() if owner != worker), default=None)

    def _swap(self, message: Swap) -> list[Instruction]:
        assert self.shares is not None
        done = self.shares.swap(message)
        got = {
            self.shares.worker(message.owner_incarnation): message.take if done else (),
            self.shares.worker(message.holder_incarnation): message.give if done else (),
        }
        return [
            Send(sender, Swapped(message.owner_incarnation, message.lease, done, got[worker]))
            for sender, worker in self._workers.items()
            if worker in got
        ]
