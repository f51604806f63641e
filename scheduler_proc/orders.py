"""What operators have made of workers, and seeing to it that the workers hear of it.

An order is by name: a worker that comes back as a new incarnation is what it was. A worker says in its hello and its
reports what its settings are; as long as they are not the wanted ones they are sent again, and a restarted scheduler,
which knows of no orders, goes on with what the workers say.
"""

from typing import Any

import msgspec

from baton.proto.lifecycle import Duty
from baton.proto.messages import Configure, Load, Settings
from baton.scheduler_proc.instructions import Outbox
from baton.scheduler_proc.registry import Registry, Worker


class Orders:
    """Owns the settings of all workers."""

    def __init__(self, epoch: int, registry: Registry, outbox: Outbox) -> None:
        self._epoch = epoch
        self._registry = registry
        self._outbox = outbox
        self._standing: dict[str, Settings] = {}  # worker name -> the settings that an operator has changed

    def change(self, worker: Worker, **changes: Any) -> None:
        """Fields of Settings from now on."""
        worker.settings = self._standing[worker.name] = msgspec.structs.replace(worker.settings, **changes)
        self._registry.forget_derived()
        self._send(worker)

    def joined(self, worker: Worker) -> None:
        """It has said hello, with the settings that it has."""
        present = _complete(worker.hello.settings, worker)
        worker.settings = self._standing.get(worker.name, present)
        if worker.settings != present:
            self._send(worker)

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
        self._outbox.send(worker.identity, Configure(self._epoch, worker.settings))


def _complete(settings: Settings, worker: Worker) -> Settings:
    return settings if settings.role else msgspec.structs.replace(settings, role=worker.hello.role)
