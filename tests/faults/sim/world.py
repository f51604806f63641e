"""Virtual time, and processes that can be killed, paused and started again."""

import heapq
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable
from random import Random

Action = Callable[[], None]

TIMER_LATENESS_S = 1e-5


class World:
    """A clock and what is to happen, in a fixed order for a given seed."""

    def __init__(self, seed: int, trace: Callable[[str], None] | None = None) -> None:
        self.now = 0.0
        self.rng = Random(seed)
        self.trace = trace
        self._agenda: list[tuple[float, int, Action]] = []
        self._order = itertools.count()

    def at(self, when: float, action: Action) -> None:
        """Do it then; actions of one instant run in the order in which they were asked for."""
        heapq.heappush(self._agenda, (max(when, self.now), next(self._order), action))

    def run(self, until: float) -> None:
        """Let time pass."""
        while self._agenda and self._agenda[0][0] <= until:
            self.now, _, action = heapq.heappop(self._agenda)
            action()
        self.now = until


class Process(ABC):
    """Something with a memory to lose. Subclasses implement start() and turn()."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.alive = False
        self.life = 0
        """Counts kills: what was under way in an earlier life never happens."""
        self.paused = False
        self.draining = False
        """What has waited is being taken in: timers come after it, as in the loops of the real processes."""
        self._backlog: list[Action] = []
        self._wake_at = float("inf")

    @abstractmethod
    def start(self) -> None:
        """Begin a life."""

    @abstractmethod
    def turn(self) -> None:
        """Look at the clock and do what is due."""

    def kill(self) -> None:
        """As by kill -9."""
        self.alive = self.paused = False
        self.life += 1
        self._backlog.clear()
        self._wake_at = float("inf")

    def pause(self) -> None:
        """As by SIGSTOP: everything for this process waits."""
        self.paused = True

    def resume(self) -> None:
        """As by SIGCONT: what has waited happens now, in order, and then the timers."""
        if not self.paused:
            return
        self.paused = False
        self.draining = True
        backlog, self._backlog = self._backlog, []
        for action in backlog:
            action()
        self.draining = False
        self._wake_at = float("inf")
        self.turn()

    def do(self, action: Action) -> None:
        """Now, or as soon as the process runs again."""
        if self.paused:
            life = self.life
            self._backlog.append(lambda: action() if self.life == life else None)
        else:
            action()

    def later(self, delay: float, action: Action) -> None:
        """After `delay` seconds, unless this life has ended by then."""
        life = self.life
        self.world.at(self.world.now + delay, lambda: self.do(action) if self.life == life else None)

    def wake(self, at: float) -> None:
        """Have turn() called at this time or earlier, and as ever a little late."""
        if at >= self._wake_at or at == float("inf"):
            return
        self._wake_at = at
        self.later(max(at - self.world.now, 0.0) + TIMER_LATENESS_S, lambda: self._woken(at))

    def _woken(self, at: float) -> None:
        if self._wake_at == at and not self.draining:
            self._wake_at = float("inf")
            self.turn()
