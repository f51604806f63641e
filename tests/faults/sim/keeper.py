"""A keeper process: the real decisions behind links that lose nothing, as between two processes of one host."""

from collections.abc import Callable
from typing import Any

from baton.keeper.state import Allocator, Keeper, Send, Watch
from baton.proto.messages import Allocate, EndTurn, Message, TakeTurn, Turn

from .model import Memory
from .world import Process, World

Receive = Callable[[Message, tuple[bytes, ...]], None]
GONE_S = 0.1
"""Mean time from a kill to the end of the process and of what it had on the device."""


class Nowhere(Allocator):
    """The pool is a Memory of the simulation."""

    def allocate(self, num_bytes: int) -> bytes:
        """Nothing is needed."""
        return b""

    def free(self, handle: bytes) -> None:
        """Nothing is kept."""


class KeeperProcess:
    """One keeper and the pool of its workers. `blocks`: worker -> how many it begins with; `delay_s` is a mean."""

    def __init__(self, world: World, blocks: dict[str, int], block_size: int, delay_s: Callable[[], float]) -> None:
        self._world = world
        self._delay_s = delay_s
        total = sum(blocks.values())
        self.memory = Memory(total, block_size)
        self.state = Keeper(Nowhere(), {name: count / total for name, count in blocks.items()})
        self.state.handle(b"first", TakeTurn(next(iter(blocks)), 1))
        self.state.handle(b"first", Allocate("kv", 1, total))
        self.state.gone(b"first")
        self._links: dict[bytes, Link] = {}

    def connect(self, process: Process, receive: Receive) -> "Link":
        """A new process wants its turn."""
        link = Link(self._world, process, self, receive, self._delay_s)
        self._links[link.name] = link
        link.send(TakeTurn(process.name, 1))
        return link

    def receive(self, link: "Link", message: Message) -> None:
        """A message of a worker has arrived."""
        self._carry_out(self.state.handle(link.name, message))  # type: ignore[arg-type]

    def gone(self, link: "Link") -> None:
        """A pidfd is readable."""
        del self._links[link.name]
        self._carry_out(self.state.gone(link.name))

    def _carry_out(self, instructions: list[Any]) -> None:
        for instruction in instructions:
            match instruction:
                case Send() if instruction.peer in self._links:
                    self._links[instruction.peer].deliver(instruction.message, instruction.frames)
                case Watch() if instruction.peer not in self._links:
                    self._carry_out(self.state.gone(instruction.peer))


class Link:
    """Between one life of a worker and the keeper: ordered, and what has been sent arrives unless the sender dies."""

    def __init__(
        self, world: World, process: Process, keeper: KeeperProcess, receive: Receive, delay_s: Callable[[], float]
    ) -> None:
        self.name = f"{process.name}:{world.rng.getrandbits(48)}".encode()
        self._world, self._process, self._keeper, self._receive = world, process, keeper, receive
        self._delay_s = delay_s
        self._life = process.life
        self._arrived_at = [0.0, 0.0]
        self._cut_at = float("inf")
        self.gone_at = float("inf")
        """Until then what the process had on the device may go on."""

    def send(self, message: Message) -> None:
        """To the keeper."""
        arrival = self._arrival(0)
        self._world.at(arrival, lambda: self._keeper.receive(self, message) if arrival <= self._cut_at else None)

    def deliver(self, message: Message, frames: tuple[bytes, ...]) -> None:
        """From the keeper. A process that has its turn needs nothing else from it and passes it on."""

        def arrive() -> None:
            if self._process.life != self._life:
                return
            self._process.do(lambda: self._receive(message, frames))

        self._world.at(self._arrival(1), arrive)
        if isinstance(message, Turn):
            self.send(EndTurn())

    def cut(self) -> None:
        """The process was killed: the last that it has sent may be lost, and in a while it is gone."""
        self._cut_at = self._world.now + self._world.rng.expovariate(1 / self._delay_s())
        self.gone_at = self._world.now + self._world.rng.expovariate(1 / GONE_S)
        self._world.at(self.gone_at, lambda: self._keeper.gone(self))

    def _arrival(self, direction: int) -> float:
        delay = self._world.rng.expovariate(1 / self._delay_s())
        self._arrived_at[direction] = max(self._world.now + delay, self._arrived_at[direction])
        return self._arrived_at[direction]
