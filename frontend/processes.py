"""Which processes a deployment has, and the environment each one needs."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum

import msgspec

from baton.proto import mps
from baton.proto.config import FrontendConfig, KeeperConfig, SchedulerConfig, ServeConfig, WorkerConfig

ChildConfig = SchedulerConfig | FrontendConfig | WorkerConfig | KeeperConfig

SPINS_ALONE = 10_000
"""Some 0.4 ms."""


class StopOrder(IntEnum):
    """Lower ones are stopped first: running streams need the workers, workers report their end to the scheduler and end
    with their keeper."""

    FRONTEND = 0
    WORKER = 1
    SCHEDULER = 2
    KEEPER = 3


@dataclass(frozen=True)
class ProcessSpec:
    """One process to keep running."""

    config: ChildConfig
    command: tuple[str, ...]
    """Arguments of the Python interpreter, without --config and --supervisor-fd."""
    stop_order: StopOrder
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set on top of the launcher's own."""
    mps_dir: str = ""
    """Of the MPS daemon that has to let go of the process before it may be killed."""
    ends_with: str = ""
    """Name of the process that has its memory; both are gone before that one is started again."""
    standby: bool = False
    """A second process waits, with everything imported, to take the place of this one."""
    config_again: ChildConfig | None = None
    """What it is given when it is started again; None: the same."""

    @property
    def name(self) -> str:
        """As in process titles, logs and metrics."""
        return self.config.name

    @property
    def again(self) -> "ProcessSpec":
        """As it is started another time."""
        return replace(self, config=self.config_again or self.config)


def specs(config: ServeConfig) -> list[ProcessSpec]:
    """Everything that `baton serve` starts, in the order of starting."""
    # Only at first does it wait for all: by the time it is started again an operator may have removed some.
    scheduler = ProcessSpec(
        config.scheduler,
        _module("baton.scheduler_proc.main"),
        StopOrder.SCHEDULER,
        thread_environment(1),
        config_again=msgspec.structs.replace(config.scheduler, expected_workers=0),
    )
    keepers = {keeper.endpoint: keeper_spec(keeper) for keeper in config.keepers}
    alone = [worker.device for worker in config.workers] == ["cpu"]
    workers = [
        worker_spec(worker, keepers[worker.keeper].name if worker.keeper else "", alone) for worker in config.workers
    ]
    return [scheduler, *keepers.values(), *workers, *map(frontend_spec, config.frontends)]


def frontend_spec(config: FrontendConfig) -> ProcessSpec:
    """One frontend."""
    return ProcessSpec(config, _module("baton.frontend.main"), StopOrder.FRONTEND, thread_environment(1))


def keeper_spec(config: KeeperConfig) -> ProcessSpec:
    """One keeper."""
    return ProcessSpec(config, _module("baton.keeper.main"), StopOrder.KEEPER, thread_environment(1))


def worker_spec(config: WorkerConfig, ends_with: str = "", alone: bool = False) -> ProcessSpec:
    """One worker; `ends_with` as in ProcessSpec; `alone`: no other computes on these cores. One that finds its weights
    in memory would mostly import code when it is started again, so another stands by."""
    environment = thread_environment(config.threads or cpu_count(), alone)
    if config.mps_dir:
        environment |= mps.environment(config.mps_dir, config.mps_percentage)
    standby = bool(config.keeper)
    command = _module("baton.worker.main")
    return ProcessSpec(config, command, StopOrder.WORKER, environment, config.mps_dir, ends_with, standby)


def _module(name: str) -> tuple[str, ...]:
    return ("-m", "baton.proto.child", name)


def cpu_count() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def thread_environment(count: int, alone: bool = False) -> dict[str, str]:
    """Threads that sleep while they wait: spinning ones take the cores from the other workers (2.9 times slower). Where
    the deployment has none they spin from one operation of a step to the next: being woken takes a quarter of it."""
    spins = SPINS_ALONE if alone else 0
    return {"OMP_NUM_THREADS": str(count), "OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": str(spins)}
