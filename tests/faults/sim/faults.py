"""What goes wrong in a history, and what an operator does, at random moments or at particularly bad ones."""

from collections import Counter
from collections.abc import Callable, Sequence

from baton.proto.lifecycle import Role
from baton.proto.messages import (
    CancelCommand,
    Close,
    Configure,
    Confirm,
    Ended,
    Fenced,
    FirstToken,
    FrontendHello,
    Gone,
    Goodbye,
    Message,
    Ok,
    Open,
    PrefillDone,
    Progress,
    Retry,
    Settled,
    StartDecode,
    StartPrefill,
    Submit,
    Welcome,
    WorkerHello,
)
from baton.scheduler_proc.operations import Operator

from .network import Network
from .scheduler import Scheduler
from .worker import Worker
from .world import Process, World

FAULTS_UNTIL_S = 6.0
STAGES = (
    *(Submit, StartPrefill, Progress, PrefillDone, FirstToken, StartDecode, Open, Settled, Confirm, Ok, Gone, Ended),
    *(Retry, CancelCommand, Close, WorkerHello, FrontendHello, Welcome, Configure, Fenced, Goodbye),
)
"""Messages of which one may be a bad moment."""


class Faults:
    """Draws them all from the world's seed."""

    def __init__(
        self,
        world: World,
        network: Network,
        scheduler: Scheduler,
        workers: Sequence[Worker],
        processes: Sequence[Process],
    ) -> None:
        self._world = world
        self._rng = world.rng
        self._network = network
        self._scheduler = scheduler
        self._workers = workers
        self._processes = processes
        self._for_good = 0.0
        """Probability that a worker which ends never comes back."""
        self._may_go = 0
        self.gone: list[Worker] = []
        """Workers that have ended for good, or are about to."""
        self._ambushes: list[tuple[type[Message], int, Callable[[], None]]] = []
        self._sent: Counter[type[Message]] = Counter()

    def plan(self) -> None:
        """Call before time begins."""
        rng, conditions = self._rng, self._network.conditions
        conditions.delay_s = rng.choice((0.0003, 0.002, 0.02))
        conditions.repeat = rng.choice((0.0, 0.05))
        conditions.dealers_keep = rng.random() < 0.5
        self._for_good = rng.choice((0.0, 0.0, 0.2, 0.7))
        self._may_go = len(self._workers) - rng.choice((0, 1, 1, 1, 1))
        faults = (self._cut, self._crash, self._leave, self._pause, self._slow)
        orders = (self._drain, self._change_role, self._cancel, self._flush, self._remove)
        kinds = [kind for kind in (*faults, *orders) if rng.random() < 0.5]
        most = rng.choice((4, 4, 20))
        for kind in kinds:
            for _ in range(rng.randint(1, most)):
                self._world.at(rng.uniform(0.3, FAULTS_UNTIL_S), kind)
        if kinds and rng.random() < 0.5:
            self._ambushes = [
                (rng.choice(STAGES), rng.randint(1, 6), rng.choice(kinds)) for _ in range(rng.randint(1, 6))
            ]
            self._network.on_send = self._watch

    def _watch(self, message: Message) -> None:
        """Some things go wrong just when a message of some kind is about to be sent for the nth time."""
        self._sent[type(message)] += 1
        for stage, nth, kind in self._ambushes:
            if stage is type(message) and nth == self._sent[stage] and self._world.now < FAULTS_UNTIL_S:
                self._world.at(self._world.now + self._rng.choice((0.0, self._network.conditions.delay_s)), kind)

    def _cut(self) -> None:
        one, other = self._rng.sample(self._processes, 2)
        self._trace(f"CUT {one.name} {other.name}")
        self._network.cut(one.name, other.name, self._rng.expovariate(1 / 0.7))

    def _crash(self) -> None:
        process = self._rng.choice(self._processes)
        if not process.alive:
            return
        self._trace(f"CRASH {process.name}")
        process.kill()
        if self._rng.random() < 0.5:
            self._world.at(self._world.now + 0.002, lambda: self._scheduler.process_died(process.name))
        if isinstance(process, Worker) and self._goes(process):
            return
        restart_s = self._rng.choice((0.01, 0.8))
        self._world.at(self._world.now + self._rng.expovariate(1 / restart_s), lambda: self._restart(process))

    def _goes(self, worker: Worker) -> bool:
        """Whether a worker that ends has ended for good."""
        if worker not in self.gone and len(self.gone) < self._may_go and self._rng.random() < self._for_good:
            self._trace(f"FOR GOOD {worker.name}")
            self.gone.append(worker)
        return worker in self.gone

    def _leave(self) -> None:
        """A worker stops in order, as by SIGTERM, and may come back."""
        worker = self._rng.choice(self._workers)
        if worker.batcher is None or worker.paused:
            return
        self._trace(f"LEAVE {worker.name}")
        worker.say_goodbye()
        worker.kill()
        if self._goes(worker):
            return
        self._world.at(self._world.now + self._rng.expovariate(1 / 0.8), lambda: self._restart(worker))

    def _drain(self) -> None:
        """An operator takes a worker out, for a while or for good."""
        worker, move = self._rng.choice(self._workers), self._rng.random() < 0.5
        if self._scheduler.operate(lambda operator, now: operator.drain(worker.name, move, now)):
            self._trace(f"DRAIN {worker.name}{' by moving' if move else ''}")
            if self._goes(worker):
                self._see_off(worker, force=False)
            else:
                self._world.at(self._world.now + self._rng.expovariate(1 / 0.8), lambda: self._resume(worker))

    def _resume(self, worker: Worker) -> None:
        if worker not in self.gone and self._scheduler.operate(lambda operator, _: operator.resume(worker.name)):
            self._trace(f"RESUME {worker.name}")

    def _see_off(self, worker: Worker, force: bool) -> None:
        """The operator insists until the worker has gone: orders may be lost together with a scheduler."""

        def remove(operator: Operator, now: float) -> None:
            if not force:
                operator.drain(worker.name, False, now)
            operator.remove(worker.name, force)

        if worker.alive:
            if self._scheduler.operate(remove):
                self._trace(f"REMOVE {worker.name}")
            self._world.at(self._world.now + 0.2, lambda: self._see_off(worker, force))

    def _change_role(self) -> None:
        """An operator gives an idle worker another role for a while."""
        name, role = self._rng.choice(self._workers).name, self._rng.choice((Role.UNIFIED, *Role))
        if self._scheduler.operate(lambda operator, _: operator.set_role(name, role)):
            self._trace(f"ROLE {name} {role}")

    def _flush(self) -> None:
        """An operator has prefix caches emptied."""
        name = self._rng.choice(("", self._rng.choice(self._workers).name))
        if self._scheduler.operate(lambda operator, _: operator.flush(name)):
            self._trace(f"FLUSH {name}")

    def _remove(self) -> None:
        """An operator ends a worker for good, and another one may come under its name."""
        worker, force = self._rng.choice(self._workers), self._rng.random() < 0.5
        if self._scheduler.operate(lambda operator, _: operator.remove(worker.name, force)):
            self._trace(f"REMOVE {worker.name}")
            if self._goes(worker):
                self._see_off(worker, force)
                return
            self._world.at(self._world.now + 0.1 + self._rng.expovariate(1 / 0.8), lambda: self._restart(worker))

    def _cancel(self) -> None:
        """An operator ends a request."""

        def cancel(operator: Operator, now: float) -> None:
            if streams := operator.requests(""):
                stream = self._rng.choice(streams)
                self._trace(f"CANCEL {stream.id}")
                operator.cancel(stream.id, now)

        self._scheduler.operate(cancel)

    def _restart(self, process: Process) -> None:
        if not process.alive and process not in self.gone:
            self._trace(f"START {process.name}")
            process.start()

    def _pause(self) -> None:
        process = self._rng.choice(self._processes)
        if not process.alive or process.paused:
            return
        self._trace(f"PAUSE {process.name}")
        life = process.life
        process.pause()
        self._world.at(
            self._world.now + self._rng.choice((0.3, 1.0, 4.0)),
            lambda: process.resume() if process.life == life else None,
        )

    def _slow(self) -> None:
        usual = self._network.conditions.delay_s
        self._trace("SLOW")
        self._network.conditions.delay_s = 0.1
        self._world.at(self._world.now + 0.5, lambda: setattr(self._network.conditions, "delay_s", min(usual, 0.02)))

    def end(self) -> None:
        """Everybody is there who has not gone for good, and the operator undoes what was ordered."""
        self._trace("faults have ended")
        self._network.heal()
        for process in self._processes:
            process.resume()
            self._restart(process)
        for worker in self._workers:
            self._end_orders(worker)

    def _end_orders(self, worker: Worker) -> None:
        """The operator looks until the worker is there, active and what it was."""
        if worker in self.gone:
            return
        name, role = worker.name, worker.spec.role
        self._restart(worker)
        self._resume(worker)
        self._scheduler.operate(lambda operator, _: operator.set_role(name, role))
        cluster = self._scheduler.cluster
        member = cluster.registry.worker_named(name) if cluster is not None else None
        if member is None or not member.active or member.role != role:
            self._world.at(self._world.now + 0.2, lambda: self._end_orders(worker))

    def _trace(self, text: str) -> None:
        if self._world.trace is not None:
            self._world.trace(f"{self._world.now:9.4f} *** {text}")
