"""What an operator may ask of the cluster: decisions only, the IO around them is admin_server.py.

ACTIVE ── drain ─► DRAINING ── streams ended or moved ─► drained ── remove ─► LEAVING ── Goodbye ─► gone
   ▲                   │                                    │
   └───── resume ──────┴────────────────────────────────────┘
"""

from collections.abc import Callable, Iterable
from enum import StrEnum

import msgspec

from baton.proto.lifecycle import Duty, Role
from baton.proto.messages import KVLink, Sid
from baton.scheduler_proc.instructions import EventKind, Observe, Outbox, WorkerJoined, WorkerLeft
from baton.scheduler_proc.membership import Membership
from baton.scheduler_proc.orders import Orders
from baton.scheduler_proc.registry import Registry, Worker
from baton.scheduler_proc.stream import Stream

LOG_LEVELS = ("debug", "info", "warning", "error")
SCHEDULER = "scheduler"
ANSWER_IDS = ("chatcmpl-", "cmpl-")
"""What the id of an answer has before that of its request."""


class Why(StrEnum):
    """The kinds of refusal, named as gRPC's status codes."""

    NOT_FOUND = "NOT_FOUND"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    INVALID_ARGUMENT = "INVALID_ARGUMENT"


class RefusedError(Exception):
    """It can't be done. The message is for the operator: why, and what to do first."""

    def __init__(self, why: Why, message: str) -> None:
        super().__init__(message)
        self.why = why


class Operator:
    """Methods raise RefusedError; what they change takes effect with the cluster's next tick."""

    def __init__(
        self,
        registry: Registry,
        streams: dict[Sid, Stream],
        membership: Membership,
        orders: Orders,
        outbox: Outbox,
        retry: Callable[[Stream, str, float], None],
        cancel: Callable[[Stream, str, float], None],
        is_held: Callable[[Stream], bool],
    ) -> None:
        self.registry = registry
        self._streams = streams
        self._membership = membership
        self._orders = orders
        self._outbox = outbox
        self._retry = retry
        self._cancel = cancel
        self._is_held = is_held

    def worker(self, name: str) -> Worker:
        """The registered incarnation."""
        worker = self.registry.worker_named(name)
        if worker is None:
            known = ", ".join(worker.name for worker in self.registry.workers.values()) or "none"
            raise RefusedError(Why.NOT_FOUND, f"there is no worker {name!r}; workers are: {known}")
        return worker

    def draining(self, name: str) -> Worker:
        """Of which somebody waits for the end of its streams."""
        worker = self.worker(name)
        if worker.active:
            raise RefusedError(Why.FAILED_PRECONDITION, f"{name} was resumed meanwhile")
        return worker

    def not_ready_because(self) -> str:
        """What stands between now and serving a request; empty when nothing does."""
        return self._membership.not_ready_because()

    def drain(self, name: str, move_streams: bool, now: float) -> Worker:
        """No new streams; those that it has end there, or go on elsewhere at once."""
        worker = self._staying(name)
        if move_streams and (missing := self._missing_without(worker)):
            raise RefusedError(
                Why.FAILED_PRECONDITION, f"the streams of {name} have nowhere to go: {missing}; drain without moving"
            )
        if worker.active:
            self._change(worker, "draining", duty=Duty.DRAINING)
            self._membership.drains(worker, now)
        if move_streams:
            for sid in list(worker.streams):
                self._retry(self._streams[sid], f"{name} is draining", now)
        return worker

    def resume(self, name: str) -> Worker:
        """Streams again."""
        worker = self._staying(name)
        if not worker.active:
            self._change(worker, "active again", duty=Duty.ACTIVE)
        return worker

    def remove(self, name: str, force: bool) -> Worker:
        """End a worker for good."""
        worker = self.worker(name)
        if not worker.drained and not force:
            what = f"is {worker.settings.duty} and {_business(worker)}"
            raise RefusedError(Why.FAILED_PRECONDITION, f"{name} {what}: drain it first, or force its removal")
        self._change(worker, "leaving", duty=Duty.LEAVING)
        return worker

    def set_role(self, name: str, role: str) -> Worker:
        """What the scheduler sends there from now on."""
        if role not in list(Role):
            raise RefusedError(Why.INVALID_ARGUMENT, f"a role is one of {', '.join(Role)}, got {role!r}")
        worker = self._staying(name)
        before = worker.role
        if role == before:
            return worker
        if not worker.idle:
            raise RefusedError(
                Why.FAILED_PRECONDITION, f"{name} {_business(worker)}: drain it before it changes its role"
            )
        self._outbox.add(Observe(WorkerLeft(name, before)))
        self._change(worker, f"{role} instead of {before}", role=role)
        self._outbox.add(Observe(WorkerJoined(name, role)))
        return worker

    def requests(self, worker: str) -> list[Stream]:
        """Open streams, oldest first; of one worker, or of all when its name is empty."""
        chosen: Iterable[Stream] = self._streams.values()
        if worker:
            chosen = [self._streams[sid] for sid in self.worker(worker).streams]
        return sorted(chosen, key=lambda stream: stream.arrived)

    def links(self, worker: str) -> list[tuple[str, KVLink]]:
        """How one worker reads the KV of others, or how all do when its name is empty: (reader, link)."""
        chosen = [self.worker(worker)] if worker else self.registry.workers.values()
        return [(each.name, link) for each in chosen for link in each.links]

    def cancel(self, name: str, now: float) -> None:
        """End a stream, or all of a request, at workers and client: by a stream's id, or by what the client calls the
        request or its answer."""
        streams = [stream for stream in self._streams.values() if stream.id == name]
        if not streams:
            names = {name, *(name[len(start) :] for start in ANSWER_IDS if name.startswith(start))} - {""}
            streams = [stream for stream in self._streams.values() if stream.request in names]
        if not streams:
            raise RefusedError(Why.NOT_FOUND, f"there is no request {name!r}; it may have ended")
        for stream in streams:
            self._cancel(stream, "an operator cancelled the request", now)
            self._outbox.happened(EventKind.REQUEST_CANCELLED, stream.id, "by an operator")

    def flush(self, name: str) -> list[Worker]:
        """Have prefix caches emptied; the workers that were told so."""
        workers = [self.worker(name)] if name else list(self.registry.workers.values())
        for worker in workers:
            self._orders.change(worker, cache_flushes=worker.settings.cache_flushes + 1)
        return workers

    def obeyed(self, workers: Iterable[Worker]) -> bool:
        """Whether those that are still there have said that they are as they were told to be.

        From then on they tell a restarted scheduler so; an order that has not reached its worker ends with this one.
        """
        return all(worker.obeys for worker in workers if worker.identity in self.registry.workers)

    def set_log_level(self, level: str, process: str) -> list[str]:
        """How much one process logs, or all of them."""
        if level not in LOG_LEVELS:
            raise RefusedError(Why.INVALID_ARGUMENT, f"a level is one of {', '.join(LOG_LEVELS)}, got {level!r}")
        workers = [worker for worker in self.registry.workers.values() if process in ("", worker.name)]
        frontends = [front for front in self.registry.frontends.values() if process in ("", front.hello.name)]
        if process not in ("", SCHEDULER) and not workers and not frontends:
            raise RefusedError(Why.NOT_FOUND, f"there is no worker or frontend {process!r}")
        for worker in workers:
            self._orders.change(worker, log_level=level)
        for frontend in frontends:
            frontend.log_level = level
        self._membership.touch()
        names = [*(worker.name for worker in workers), *(frontend.hello.name for frontend in frontends)]
        if process in ("", SCHEDULER):
            self._membership.set_log_level(level)
            names.append(SCHEDULER)
        return names

    def _staying(self, name: str) -> Worker:
        worker = self.worker(name)
        if worker.settings.duty == Duty.LEAVING:
            raise RefusedError(Why.FAILED_PRECONDITION, f"{name} is leaving; start another worker instead")
        return worker

    def _change(self, worker: Worker, text: str, **changes: str) -> None:
        self._orders.change(worker, **changes)
        self._membership.touch()
        self._outbox.log(f"{worker.name} is {text}, an operator says")
        self._outbox.happened(EventKind.WORKER_CHANGED, worker.name, text)

    def _missing_without(self, worker: Worker) -> str:
        """What would be missing for the streams of this worker to go on if it got none."""
        before = worker.settings
        worker.settings = msgspec.structs.replace(before, duty=Duty.DRAINING)
        self.registry.forget_derived()
        missing = self.registry.missing()
        stranded = [stream.id for sid in worker.streams if not self._is_held(stream := self._streams[sid])]
        if stranded and not missing:
            missing = f"nobody else holds {len(stranded)} of them to their end, {stranded[0]} for one"
        worker.settings = before
        self.registry.forget_derived()
        return missing


def _business(worker: Worker) -> str:
    leases = worker.load.leases if worker.load else 0
    streams = max(len(worker.streams), len(worker.holdings), worker.num_streams)  # known here, or as it last said
    return f"has {streams} streams and {leases} leases"
