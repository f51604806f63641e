"""The scheduler process: the real cluster between simulated sockets."""

from collections.abc import Callable

import msgspec

from baton.proto.config import SchedulerConfig
from baton.proto.messages import Message
from baton.scheduler_proc.cluster import Cluster
from baton.scheduler_proc.instructions import Instruction, Log, Send, Unwatch, Watch
from baton.scheduler_proc.operations import Operator, RefusedError

from .network import Network
from .world import Process, World


class Scheduler(Process):
    """Follows scheduler_proc/main.py. A process that dies is noticed at once or by its missing beats, as drawn."""

    def __init__(self, world: World, network: Network, config: SchedulerConfig) -> None:
        super().__init__(world, "scheduler")
        self._network = network
        self._config = config
        self.cluster: Cluster | None = None
        self._watched: dict[str, bytes] = {}

    def start(self) -> None:
        """A new epoch that knows nobody, by a clock that may have been set back."""
        self.alive = True
        # As the launcher has it: only at first it waits for all.
        config = msgspec.structs.replace(self._config, expected_workers=0) if self.life else self._config
        self.cluster = Cluster(config, self.world.rng.randrange(1, 2**40))
        self._watched.clear()
        self._network.bind(self, "scheduler", self._on_message)
        self.turn()

    def kill(self) -> None:
        """Forget everything."""
        super().kill()
        self._network.unbind(self)
        self.cluster = None

    def operate(self, ask: Callable[[Operator, float], object]) -> bool:
        """An operator asks; whether it was done."""
        cluster = self.cluster
        if cluster is None or self.paused:
            return False
        try:
            ask(cluster.operator, self.world.now)
        except RefusedError:
            return False
        self.turn()
        return True

    def turn(self) -> None:
        """Timers."""
        self._act(lambda cluster: cluster.tick(self.world.now))

    def process_died(self, name: str) -> None:
        """A pidfd became readable."""
        peer = self._watched.pop(name, None)
        if peer is not None:
            self.do(lambda: self._act(lambda cluster: cluster.peer_lost(peer, "its process has died", self.world.now)))

    def _on_message(self, sender: bytes, message: Message, frames: tuple[bytes, ...]) -> None:
        self._act(lambda cluster: cluster.handle(sender, message, frames, self.world.now))

    def _act(self, step: Callable[[Cluster], list[Instruction]]) -> None:
        cluster = self.cluster
        if cluster is None:
            return
        for instruction in step(cluster):
            match instruction:
                case Send():
                    self._network.send(
                        self, instruction.peer.decode(), b"scheduler", instruction.message, instruction.frames
                    )
                case Watch():
                    self._watched[_name(instruction.peer)] = instruction.peer
                case Unwatch():
                    if self._watched.get(_name(instruction.peer)) == instruction.peer:
                        del self._watched[_name(instruction.peer)]
                case Log() if self.world.trace is not None:
                    self.world.trace(f"{self.world.now:9.4f} scheduler: {instruction.text}")
        self.wake(cluster.next_deadline())


def _name(peer: bytes) -> str:
    return peer.decode().rpartition(":")[0]
