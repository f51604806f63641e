"""What operators have made of workers, and seeing to it that the workers hear of it.

An order is by name: a worker that comes back as a new incarnation is what it was. A worker says in its hello and its
reports what its settings are; as long as they are not the wanted ones they are sent again. A restarted scheduler knows
of no orders and takes for one what differs from the settings that a worker starts with.
"""

from typing import Any

import msgspec

from baton.proto.lifecycle import Duty
from baton.proto.messages import Configure, Load, Settings
from baton.scheduler_proc.instructions import Outbox
from baton.scheduler_proc.registry import Registry, Worker

ABSENT_MEMORY = 1024
"""Names of workers that are not there for which orders are kept, those ordered last."""


class Orders:
    """Owns the settings of all workers."""

    def __init__(self, registry: Registry, outbox: Outbox) -> None:
        self._registry = registry
        self._outbox = outbox
        self._standing: dict[str, dict[str, Any]] = {}
        """Worker name -> the fields of its settings that an operator has changed."""

    def change(self, worker: Worker, **changes: Any) -> None:
        """Fields of Settings from now on."""
        self._standing[worker.name] = self._standing.pop(worker.name, {}) | changes
        worker.settings = msgspec.structs.replace(worker.settings, **changes)
        self._registry.forget_derived()
        self._send(worker)

    def joined(self, worker: Worker) -> None:
        """It has said hello, with the settings that it has."""
        present = _complete(worker.hello.settings, worker)
        if worker.name not in self._standing and (orders := _changes(Settings(role=worker.hello.role), present)):
            self._standing[worker.name] = orders  # of a scheduler before this one
        worker.settings = msgspec.structs.replace(present, **self._standing.get(worker.name, {}))
        if worker.settings != present:
            self._send(worker)
        there = {each.name for each in self._registry.workers.values()}
        for name in [name for name in self._standing if name not in there][:-ABSENT_MEMORY]:
            del self._standing[name]

    def reported(self, worker: Worker, load: Load) -> None:
        """It has said how it is."""
        if load.settings is None:
            return
        worker.obeys = _complete(load.settings, worker) == worker.settings
        if not worker.obeys:
            self._send(worker)

    def left(self, worker: Worker) -> None:
        """In order: if it was told to, its name is free for another worker."""
        if worker.settings.duty == Duty.LEAVING:
            self._standing.pop(worker.name, None)

    def _send(self, worker: Worker) -> None:
        worker.obeys = False
        self._outbox.send(worker.identity, Configure(self._registry.epoch, worker.settings))


def _complete(settings: Settings, worker: Worker) -> Settings:
    return settings if settings.role else msgspec.structs.replace(settings, role=worker.hello.role)


def _changes(before: Settings, after: Settings) -> dict[str, Any]:
    old, new = msgspec.structs.asdict(before), msgspec.structs.asdict(after)
    return {name: value for name, value in new.items() if value != old[name]}
