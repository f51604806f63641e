"""Who joins, who lives, who is out, and what everybody is told about it.

    unknown ── WhoAreYou ─► hello ─► member ── no beat, a stuck step, a death, a newer incarnation ─► lost (Fenced)
                                        └──── Goodbye ─► left

A worker incarnation that was declared lost is never listened to again: it is told so (Fenced), drops everything and
comes back as a new one. A lost frontend may come back as it is: its streams are claims then.
"""

import logging
from collections.abc import Callable

from baton.proto import PROTOCOL_VERSION
from baton.proto.channels import identity
from baton.proto.config import SchedulerConfig
from baton.proto.messages import (
    Beat,
    ClusterStatus,
    Fenced,
    FrontendHello,
    Goodbye,
    NotAdmitted,
    Welcome,
    WhoAreYou,
    WorkerHello,
)
from baton.scheduler_proc.instructions import (
    EventKind,
    Observe,
    Outbox,
    SetLogLevel,
    Unwatch,
    Watch,
    WorkerJoined,
    WorkerLeft,
)
from baton.scheduler_proc.orders import Orders
from baton.scheduler_proc.registry import Frontend, Registry, Worker

STATUS_INTERVAL_S = 2.0
"""ClusterStatus is sent this often also without a change: one may be lost, and figures age."""
ASK_INTERVAL_S = 0.5
"""An unknown peer is asked who it is no more often than this."""
ALIVE_S = 1.5
"""Whoever has beaten so lately is: beats come every 0.5 s."""
STUCK_STEP_S = 30.0
"""No step is called stuck before it has run so long."""


class Membership:
    """Calls `worker_lost` and `frontend_lost` after a member was removed."""

    def __init__(
        self,
        config: SchedulerConfig,
        epoch: int,
        registry: Registry,
        outbox: Outbox,
        orders: Orders,
        worker_lost: Callable[[Worker, str, float], None],
        frontend_lost: Callable[[Frontend, float], None],
    ) -> None:
        self._config = config
        self._epoch = epoch  # by which frontends know one start from another; registry.epoch is for workers
        self._registry = registry
        self._outbox = outbox
        self._orders = orders
        self._worker_lost = worker_lost
        self._frontend_lost = frontend_lost
        self._served_at: float | None = None
        self._changed = False
        self._log_level = ""
        self._standing_in = ""
        self._announced: str | None = None
        self._status_at = float("-inf")
        self._swept_at: float | None = None
        self._began: float | None = None
        self._joined_at = 0.0  # the last worker, or this process began
        self._lost: list[tuple[float, Worker]] = []  # who left lately or began to drain, and when
        self._spares: dict[str, bytes] = {}  # by name: who was turned away for a worker of the same name
        self._asked: dict[bytes, float] = {}

    def worker_hello(self, sender: bytes, hello: WorkerHello, now: float) -> Worker | None:
        """The member, new or known; None when it may not join."""
        if not self._may_join(sender, hello.worker, hello.incarnation, hello.protocol, now):
            return None
        if hello.epoch > self._registry.epoch:
            why = "has obeyed a scheduler that started at a later time: was the clock set back?"
            self._outbox.log(f"{hello.worker} {why}", logging.WARNING)
            self._registry.epoch = hello.epoch + 1
        known = self._registry.workers.get(sender)
        if known is not None:
            known.heard_at = now
            self._outbox.send(sender, Welcome(self._registry.epoch))
            return known
        if self._turned_away(sender, hello, now):
            return None
        earlier = self._registry.worker_named(hello.worker)
        if earlier is not None:
            self.lost(earlier.identity, "a newer incarnation has registered", now)
        worker = Worker(sender, hello, joined_at=now, heard_at=now)
        self._joined_at = now
        self._join(worker, hello.pid, hello.pid_space)
        self._orders.joined(worker)
        self._outbox.happened(EventKind.WORKER_JOINED, worker.name, f"{worker.role}, {worker.settings.duty}")
        self._outbox.add(Observe(WorkerJoined(worker.name, worker.role)))
        where = f" on {hello.host}" if hello.distant else ""
        blocks = f"{hello.num_blocks} blocks of {hello.block_size} tokens"
        self._outbox.log(f"{worker.name} joined{where}: {worker.role}, {blocks}")
        for other, why in self._registry.mismatches_of(worker):
            self._outbox.log(f"{worker.name} and {other.name} can't exchange KV: {why}", logging.ERROR)
        return worker

    def _turned_away(self, sender: bytes, hello: WorkerHello, now: float) -> bool:
        """A model other than that of those who are there must not answer beside theirs; and of two processes of one
        name that are alive, the first stays: else each would have the other fenced, for ever."""
        twin = self._registry.worker_named(hello.worker)
        others = (each for each in self._registry.workers.values() if each is not twin)
        odd = next((each for each in others if each.hello.layout.fingerprint != hello.layout.fingerprint), None)
        if odd is not None:
            why = f"{hello.worker} has another model than {odd.name}, or its weights in another form"
            why += f": {odd.hello.layout.mismatch(hello.layout)}"
        elif twin is not None and _elsewhere(twin.hello, hello) and now - twin.heard_at < ALIVE_S:
            why = f"there is a worker {hello.worker} already, and it is alive; give another --name"
        else:
            return False
        if self._should_ask(sender, now):
            self._outbox.log(f"not admitted: {why}", logging.ERROR)
        self._outbox.send(sender, NotAdmitted(hello.incarnation, why, final=odd is not None))
        if odd is None:
            self._spares[hello.worker] = sender
        return True

    def frontend_hello(self, sender: bytes, hello: FrontendHello, now: float) -> bool:
        """Whether it is a member now."""
        if not self._may_join(sender, hello.name, hello.frontend, hello.protocol, now):
            return False
        earlier = self._registry.frontend_named(hello.name)
        if earlier is not None and earlier.identity != sender:
            self.lost(earlier.identity, "a newer incarnation has registered", now)
        if earlier is None or earlier.identity != sender:
            self._outbox.log(f"{hello.name} joined with {len(hello.claims)} open streams")
            self._outbox.happened(EventKind.FRONTEND_JOINED, hello.name, f"{len(hello.claims)} open streams")
        self._join(Frontend(sender, hello, now, hello.log_level), hello.pid)
        if hello.scheduler_log_level and not self._log_level:
            self.set_log_level(hello.scheduler_log_level)  # of a scheduler before this one
        return True

    def _may_join(self, sender: bytes, name: str, incarnation: int, protocol: int, now: float) -> bool:
        if self._fence(sender, incarnation):
            return False
        if protocol == PROTOCOL_VERSION:
            return True
        if self._should_ask(sender, now):
            self._outbox.log(f"{name} speaks protocol {protocol}, this is {PROTOCOL_VERSION}: refused", logging.ERROR)
        return False

    def _join(self, member: Worker | Frontend, pid: int, pid_space: str = "") -> None:
        self._registry.add(member)
        self._changed = True
        self._asked.pop(member.identity, None)
        epoch = self._registry.epoch if isinstance(member, Worker) else self._epoch
        self._outbox.send(member.identity, Welcome(epoch))
        if pid:
            self._outbox.add(Watch(member.identity, pid, pid_space))

    def heard(self, sender: bytes, now: float) -> Worker | Frontend | None:
        """The member that spoke; whoever is none is asked to say hello, or told that it is out."""
        member = self._registry.member(sender)
        if member is not None:
            member.heard_at = now
        elif not self._fence(sender, _incarnation(sender)) and self._should_ask(sender, now):
            self._outbox.send(sender, WhoAreYou(self._epoch))
        return member

    def beat(self, beat: Beat, now: float) -> None:
        """A sign of life, from a socket of its own."""
        member = self.heard(identity(beat.name, beat.incarnation), now)
        expected = max(STUCK_STEP_S, self._config.stuck_factor * beat.expected_s)
        if isinstance(member, Worker) and beat.step_running_s > expected:
            why = f"step {beat.step} has run for {beat.step_running_s:.0f} s, {beat.expected_s:.3f} were expected"
            self.lost(member.identity, why, now)

    def _should_ask(self, sender: bytes, now: float) -> bool:
        if now - self._asked.get(sender, float("-inf")) < ASK_INTERVAL_S:
            return False
        self._asked[sender] = now
        return True

    def _fence(self, sender: bytes, incarnation: int) -> bool:
        """Whether the sender is out. One that left in order gets no answer."""
        reason = self._registry.fence_reason(sender)
        if reason:
            self._outbox.send(sender, Fenced(incarnation, reason))
        return reason is not None

    def goodbye(self, message: Goodbye, now: float) -> None:
        """It leaves in order; what it still has goes elsewhere."""
        peer = identity(message.name, message.incarnation)
        worker = self._registry.workers.get(peer)
        if worker is not None:
            self._orders.left(worker)
        self._remove(peer, "has left", fence_reason="", now=now)

    def lost(self, peer: bytes, reason: str, now: float) -> None:
        """A member is out, whether it knows it or not."""
        if peer in self._registry.workers:
            self._outbox.send(peer, Fenced(_incarnation(peer), reason))
        self._remove(peer, reason, fence_reason=reason, now=now)

    def _remove(self, peer: bytes, reason: str, fence_reason: str, now: float) -> None:
        member = self._registry.member(peer)
        if member is None:
            return
        self._registry.remove(member)
        self._outbox.add(Unwatch(peer))
        self._changed = True
        level = logging.WARNING if fence_reason else logging.INFO
        if isinstance(member, Worker):
            self._registry.remember_gone(peer, fence_reason)
            self._lost.append((now, member))
            if spare := self._spares.pop(member.name, b""):
                self._outbox.send(spare, WhoAreYou(self._epoch))
            self._outbox.add(Observe(WorkerLeft(member.name, member.role)))
            text = f"{reason}; {len(member.streams)} streams go elsewhere"
            self._outbox.log(f"{member.name}: {text}", level)
            self._outbox.happened(EventKind.WORKER_LOST if fence_reason else EventKind.WORKER_LEFT, member.name, text)
            self._worker_lost(member, reason, now)
        else:
            self._outbox.log(f"{member.hello.name}: {reason}", level)
            self._outbox.happened(EventKind.FRONTEND_LEFT, member.hello.name, reason)
            self._frontend_lost(member, now)

    def sweep(self, now: float) -> None:
        """Beats that are overdue."""
        self.unserved_s(now)
        if self._began is None:
            self._began = self._joined_at = now
        if not self._config.expected_workers and now - self._began >= self._config.grace_s:
            self._registry.complete_once = True  # restarted: who lives has come back
        self._lost = [(at, worker) for at, worker in self._lost if now - at < self._config.no_workers_s]
        timeout = self._config.heartbeat_timeout_s
        paused = self._swept_at is not None and now - self._swept_at > timeout / 2
        self._swept_at = now
        for member in self._registry.members():
            if paused:  # it was this process that stood still: nobody could be heard
                member.heard_at = now
            elif now - member.heard_at > timeout:
                self.lost(member.identity, f"no beat for {timeout:.0f} s", now)
        self._asked = {peer: at for peer, at in self._asked.items() if now - at < ASK_INTERVAL_S}

    def may_hold_soon(self, needed: int, now: float) -> bool:
        """Whether a worker with room for so many tokens may come: again, or while not all have had the time to."""
        settled = self._began is not None and now - self._began >= self._config.grace_s
        waited_for = not self._registry.complete_once and now - self._joined_at < self._config.no_workers_s
        return self.lost_lately(needed, now) or not settled or waited_for

    def lost_lately(self, needed: int, now: float) -> bool:
        """Whether a worker with room for so many tokens took streams lately: one that stood in may restart, too."""
        return any(now - at < self._config.no_workers_s and worker.fits(needed) for at, worker in self._lost)

    def unserved_s(self, now: float) -> float:
        """For how long a role has lacked; it looks at least once per sweep."""
        if self._served_at is None or not self._registry.lacks_role():
            self._served_at = now
        return now - self._served_at

    def drains(self, worker: Worker, now: float) -> None:
        """It gets no streams any more. It is waited for as if it had left: it may be resumed, or restart."""
        self._lost.append((now, worker))

    def set_log_level(self, level: str) -> None:
        """How much this process logs. Frontends are told it, and tell it a restarted scheduler."""
        self._log_level = level
        self._outbox.add(SetLogLevel(level))
        self.touch()

    def touch(self) -> None:
        """What frontends are told has changed."""
        self._changed = True

    def publish(self, now: float) -> None:
        """Tell frontends who is there, when that has changed and every STATUS_INTERVAL_S."""
        if not self._changed and now - self._status_at < STATUS_INTERVAL_S:
            return
        reason = self.not_ready_because()
        if not reason and not self._registry.complete_once:
            self._registry.complete_once = True
        self._say_who_stands_in()
        self._changed, self._status_at = False, now
        if reason != self._announced:
            self._announced = reason
            self._outbox.happened(EventKind.NOT_READY if reason else EventKind.READY, "", reason)
        workers = tuple(worker.status() for worker in self._registry.workers.values())
        for peer, frontend in self._registry.frontends.items():
            status = ClusterStatus(self._epoch, not reason, reason, workers, frontend.log_level, self._log_level)
            self._outbox.send(peer, status)

    def _say_who_stands_in(self) -> None:
        # Without frontends there is nobody to serve: all are leaving.
        standing_in = self._registry.standing_in() if self._registry.frontends else ""
        if standing_in == self._standing_in:
            return
        self._standing_in = standing_in
        if standing_in:
            self._outbox.log(standing_in, logging.WARNING)
        elif not self._registry.lacks_role():
            self._outbox.log("every role has a worker again")

    def not_ready_because(self) -> str:
        """What is missing for a request to be served; empty when nothing is."""
        expected, present = self._config.expected_workers, len(self._registry.workers)
        if not self._registry.complete_once and present < expected:
            return f"{present} of {expected} workers are there"
        return self._registry.missing()


def _elsewhere(one: WorkerHello, other: WorkerHello) -> bool:
    """Whether two are not the same process."""
    return (one.host, one.pid_space, one.pid) != (other.host, other.pid_space, other.pid)


def _incarnation(peer: bytes) -> int:
    """The second half of an identity; 0 for a peer that named itself otherwise."""
    _, _, incarnation = peer.rpartition(b":")
    return int(incarnation) if incarnation.isdigit() else 0
