"""The cluster's brain: admission, placement, handoff and recovery, as a state machine.

Messages and a clock in, instructions out: no sockets, no waiting, no time of its own. It decides once or twice per
request; what happens token by token is between workers and frontends. The life of a stream is drawn in stream.py.

Nothing here is the only copy. A lost message shows in a worker's holdings (reconcile.py) or is sent again by whoever
needs the answer; after a restart of the scheduler frontends claim their streams and workers list what they hold.
"""

import logging
from collections.abc import Callable
from typing import Any

from baton.proto.channels import Frame
from baton.proto.config import SchedulerConfig
from baton.proto.lifecycle import RejectCode
from baton.proto.messages import (
    Accepted,
    Beat,
    Cancelled,
    Close,
    CloseAck,
    Ended,
    FirstToken,
    FrontendHello,
    Goodbye,
    KVLink,
    Load,
    PrefillDone,
    Progress,
    Refused,
    Rejected,
    Retry,
    Sid,
    Submit,
    WorkerHello,
)
from baton.scheduler_proc.instructions import EventKind, Instruction, LoadReport, Observe, Outbox
from baton.scheduler_proc.legs import Legs
from baton.scheduler_proc.membership import Membership
from baton.scheduler_proc.operations import Operator
from baton.scheduler_proc.orders import Orders
from baton.scheduler_proc.placement import make_policy
from baton.scheduler_proc.reconcile import Reconciler
from baton.scheduler_proc.registry import Frontend, Registry, Worker
from baton.scheduler_proc.stream import AdmissionQueue, Handoff, State, Stream

SWEEP_S = 0.25
"""Timers are coarse: all of them are looked at this often."""
NOTICE_RESEND_S = 1.0
"""A Retry or Rejected that the frontend has not answered is sent again this often."""
CLOSED_MEMORY_S = 60.0
"""A closed stream is not revived by a late duplicate of its Submit for so long."""
QUEUE_FULL_RETRY_S = 1.0
"""What a client is told when the queue is full."""
EARLY_BIND_REMAINING_S = 1.0
"""A long prompt is handed over chunk by chunk once half of it has settled, or the rest takes no longer than this."""


class Cluster:
    """All streams of the cluster and everybody in it. Methods return instructions to be carried out in order."""

    def __init__(self, config: SchedulerConfig, epoch: int) -> None:
        """`epoch` is another than any earlier scheduler's, and had better be higher."""
        self.registry = Registry(epoch)
        self.streams: dict[Sid, Stream] = {}
        self.queue = AdmissionQueue()
        self._config = config
        self._outbox = Outbox()
        self._legs = Legs(self.registry, self._outbox)
        self._policy = make_policy(config.placement.policy)
        self._orders = Orders(self.registry, self._outbox)
        self._membership = Membership(
            config, epoch, self.registry, self._outbox, self._orders, self._worker_lost, self._frontend_lost
        )
        self._reconciler = Reconciler(config, self.registry, self.streams, self._legs, self._retry)
        self.operator = Operator(
            self.registry,
            self.streams,
            self._membership,
            self._orders,
            self._outbox,
            self._retry,
            self._cancel,
            self._is_held,
        )
        """What it is asked to do is done with the next tick."""
        self._closed: dict[Sid, float] = {}  # sid -> when, oldest first
        self._next_sweep = 0.0
        self._from_frontend: dict[type, Callable[[Frontend, Any, tuple[Frame, ...], float], None]] = {
            Submit: self._on_submit,
            Close: self._on_close,
        }
        self._from_worker: dict[type, Callable[[Worker, Any, float], None]] = {
            Load: self._on_load,
            Progress: self._on_progress,
            PrefillDone: self._on_prefill_done,
            FirstToken: self._on_first_token,
            Ended: self._on_ended,
            Refused: self._on_refused,
        }

    @property
    def idle(self) -> bool:
        """Whether nobody waits for anything."""
        return not self.streams

    def handle(self, sender: bytes, message: Any, frames: tuple[Frame, ...], now: float) -> list[Instruction]:
        """One message of ToScheduler, from the peer with this ZeroMQ identity."""
        match message:
            case WorkerHello():
                self._on_worker_hello(sender, message, now)
            case FrontendHello():
                self._on_frontend_hello(sender, message, now)
            case Beat():
                self._membership.beat(message, now)
            case Goodbye():
                self._membership.goodbye(message, now)
            case _:
                self._on_message(sender, message, frames, now)
        return self._settle(now)

    def _on_message(self, sender: bytes, message: Any, frames: tuple[Frame, ...], now: float) -> None:
        member = self._membership.heard(sender, now)
        if isinstance(member, Worker) and type(message) in self._from_worker:
            self._from_worker[type(message)](member, message, now)
        elif isinstance(member, Frontend) and type(message) in self._from_frontend:
            self._from_frontend[type(message)](member, message, frames, now)
        elif member is not None:
            name = sender.decode(errors="replace")
            self._outbox.log(f"{name} must not send {type(message).__name__}: ignored", logging.ERROR)

    def peer_lost(self, identity: bytes, reason: str, now: float) -> list[Instruction]:
        """A process was seen to die."""
        self._membership.lost(identity, reason, now)
        return self._settle(now)

    def tick(self, now: float) -> list[Instruction]:
        """Everything whose time has come."""
        if now >= self._next_sweep:
            self._next_sweep = now + SWEEP_S
            self._membership.sweep(now)
            for stream in list(self.streams.values()):
                self._sweep(stream, now)
            while self._closed:
                sid, closed_at = next(iter(self._closed.items()))
                if now - closed_at < CLOSED_MEMORY_S:
                    break
                del self._closed[sid]
        return self._settle(now)

    def _settle(self, now: float) -> list[Instruction]:
        self._dispatch(now)
        self._membership.publish(now)
        return self._outbox.take()

    def next_deadline(self) -> float:
        """When `tick` has something to do."""
        return self._next_sweep

    def _on_frontend_hello(self, sender: bytes, hello: FrontendHello, now: float) -> None:
        if self._membership.frontend_hello(sender, hello, now):
            self._reconciler.claim(sender, hello.claims, now)

    def _on_submit(self, frontend: Frontend, submit: Submit, frames: tuple[Frame, ...], now: float) -> None:
        stream = self.streams.get(submit.sid)
        if stream is not None and (submit.attempt <= stream.attempt or isinstance(stream.notice, Cancelled)):
            self._again(stream, submit)
            return
        if submit.sid in self._closed or len(frames) != 2:
            return
        arrived = now
        if stream is not None:
            arrived = stream.arrived
            self._legs.cancel_all(stream)
            self._forget(stream)
        stream = Stream(
            sid=submit.sid,
            attempt=submit.attempt,
            frontend=frontend.identity,
            prompt_len=submit.prompt_len,
            since=now,
            state=State.QUEUED,
            params=submit.params,
            frames=frames,
            num_tokens=memoryview(frames[0]).nbytes // 4,
            priority=submit.priority,
            deadline=now + submit.timeout_s if submit.timeout_s > 0 else float("inf"),
            arrived=arrived,
            sibling=(submit.sid[0], submit.sibling) if submit.sibling else None,
            request=submit.request,
        )
        rejection = self._rejection(stream, now)
        if rejection is not None:
            self._outbox.send(frontend.identity, rejection)
            return
        self.streams[submit.sid] = stream
        self.queue.push(stream)
        if submit.attempt > 1:  # whoever ended the one before: this scheduler, an earlier one, or the frontend itself
            self._outbox.add(Observe(submit))
        self._outbox.send(frontend.identity, Accepted(submit.sid, submit.attempt))

    def _again(self, stream: Stream, submit: Submit) -> None:
        """A Submit that is known already: its answer was lost, or crossed it."""
        if submit.attempt < stream.attempt:
            return
        if stream.notice is not None:
            self._outbox.send(stream.frontend, stream.notice)
            return
        self._outbox.send(stream.frontend, Accepted(stream.sid, stream.attempt))

    def _rejection(self, stream: Stream, now: float) -> Rejected | None:
        code = message = ""
        if stream.attempt == 1 and len(self.queue) >= self._config.max_waiting:
            code, message = RejectCode.QUEUE_FULL, f"{len(self.queue)} requests are waiting already"
        elif too_long := self._too_long(stream, now):
            # Somebody held one that has begun, and may come back; while not all have come, one may yet; and who drains
            # may be resumed.
            passing = stream.begun or not self.registry.complete_once or bool(self._idling(stream))
            code, message = RejectCode.NO_WORKERS if passing else RejectCode.TOO_LONG, too_long
        elif self._unserved_s(stream, now) >= self._config.no_workers_s:
            code, message = RejectCode.NO_WORKERS, self.registry.lacking()
        if not code:
            return None
        retry_after_s = QUEUE_FULL_RETRY_S if code == RejectCode.QUEUE_FULL else 0.0
        return Rejected(stream.sid, stream.attempt, code, message, retry_after_s)

    def _too_long(self, stream: Stream, now: float) -> str:
        """Why no worker could ever run a stream; empty when one could, or may once it is there (again)."""
        if self._able(stream) or self.registry.lacks_role(stream.pooled):
            return ""
        if self._membership.may_hold_soon(stream.room, now):
            return ""
        output = " and room for output" * (stream.room - stream.num_tokens)
        but = "".join(f"; {worker.name} would, and is {worker.settings.duty}" for worker in self._idling(stream))
        return f"{stream.num_tokens} tokens{output} are more than any worker holds{but}"

    def _idling(self, stream: Stream) -> list[Worker]:
        """Who could hold a stream, but gets none."""
        return [w for w in self.registry.workers.values() if not w.active and w.fits(stream.room)]

    def _able(self, stream: Stream) -> list[Worker]:
        """Workers from which a stream can go all the way; or which have just room for all of one that has begun, and so
        can say that this was its end."""
        able = self._holding(stream.room, stream.pooled)
        return able or [w for w in self.registry.stand_ins() if stream.begun and w.fits(stream.num_tokens)]

    def _holding(self, room: int, pooled: bool) -> list[Worker]:
        """Workers from which so many tokens can go all the way: as their roles have it, else alone."""
        able = [worker for worker in self.registry.prefill_workers(pooled) if worker.fits(room)]
        if not pooled:
            able = [w for w in able if not self.registry.hands_over(w) or self._hands_over(w, room)]
        return able or [worker for worker in self.registry.stand_ins() if worker.fits(room)]

    def _is_held(self, stream: Stream) -> bool:
        """Whether a stream can go on, however long it has grown: its rows do not pass here. What no member holds, it
        can't have become."""
        longest = max((worker.longest for worker in self.registry.workers.values()), default=0)
        whole = stream.prompt_len + stream.params.max_tokens if stream.params else longest
        return bool(self._holding(min(whole, longest), stream.pooled))

    def _hands_over(self, worker: Worker, room: int) -> bool:
        """Whether what this worker prefills of a stream that needs so much room goes on elsewhere."""
        takers = self.registry.decode_workers(worker) if self.registry.hands_over(worker) else []
        return any(taker.fits(room) for taker in takers)

    def _roomiest(self, workers: list[Worker], stream: Stream) -> list[Worker]:
        """Those that can hold the stream to its end, if there are any: others would end it where their context ends."""
        assert stream.params is not None
        whole = stream.prompt_len + stream.params.max_tokens
        return [w for w in workers if self._hands_over(w, stream.room) or w.fits(whole)] or workers

    def _unserved_s(self, stream: Stream, now: float) -> float:
        """How long nobody has been there who could serve a stream; 0 when somebody is."""
        # Asked of each stream that waits, and nearly always no role lacks: that is known without a look at the workers.
        unserved_s = self._membership.unserved_s(now)
        if not unserved_s or self._able(stream):
            return 0.0
        stood_in = self.registry.complete_once and self._membership.lost_lately(stream.room, now)
        return 0.0 if stood_in else unserved_s

    def _on_close(self, frontend: Frontend, close: Close, _frames: tuple[Frame, ...], now: float) -> None:
        stream = self.streams.get(close.sid)
        if stream is not None:
            self._legs.cancel_all(stream)
            self._forget(stream)
        if close.sid not in self._closed:
            self._closed[close.sid] = now
            self._outbox.add(Observe(close))
        self._outbox.send(frontend.identity, CloseAck(close.sid))

    def _frontend_lost(self, frontend: Frontend, _now: float) -> None:
        for stream in [s for s in self.streams.values() if s.frontend == frontend.identity]:
            self._legs.cancel_all(stream)
            self._forget(stream)

    def _on_worker_hello(self, sender: bytes, hello: WorkerHello, now: float) -> None:
        worker = self._membership.worker_hello(sender, hello, now)
        if worker is not None:
            self._reconciler.holdings(worker, hello.holdings, now)

    def _worker_lost(self, worker: Worker, reason: str, now: float) -> None:
        """Whoever had a leg there starts again. A prefill worker that has handed over has no leg any more."""
        for sid in list(worker.streams):
            self._retry(self.streams[sid], f"{worker.name}: {reason}", now)

    def _on_load(self, worker: Worker, load: Load, now: float) -> None:
        before = worker.links
        worker.take_load(load)
        for link in [link for link in worker.links if link not in before]:
            self._outbox.happened(EventKind.LINK_CHANGED, worker.name, _described(link))
        self._orders.reported(worker, load)
        self._outbox.add(Observe(LoadReport(worker.name, worker.hello.incarnation, worker.role, load)))
        if load.holdings is not None:
            self._reconciler.holdings(worker, load.holdings, now)

    def _on_progress(self, worker: Worker, report: Progress, now: float) -> None:
        stream = self._prefilling(worker, report)
        if stream is None or stream.decode is not None or not stream.frames:
            return
        stream.handoff = Handoff(report.lease, report.num_tokens, report.blocks, None)
        remaining = report.total_tokens - report.num_tokens
        if 2 * report.num_tokens >= report.total_tokens or remaining < EARLY_BIND_REMAINING_S * report.tokens_per_s:
            self._bind(stream, now)

    def _on_prefill_done(self, worker: Worker, report: PrefillDone, now: float) -> None:
        stream = self._prefilling(worker, report)
        if stream is None:
            return
        stream.handoff = Handoff(report.lease, report.num_tokens, report.blocks, report.first_rows, now)
        if stream.decode is None:
            stream.enter(State.HANDOFF, now)
            self._bind(stream, now)

    def _on_first_token(self, worker: Worker, report: FirstToken, now: float) -> None:
        stream = self._prefilling(worker, report)
        if stream is not None:
            stream.enter(State.DECODING, now)
            stream.frames = ()

    def _on_ended(self, worker: Worker, report: Ended, now: float) -> None:
        stream = self._at(report)
        leg = stream.leg_on(worker.identity) if stream else None
        if stream is None or leg is None:
            return
        self._legs.drop(stream, leg)
        if report.retry:
            self._retry(stream, report.retry, now)
        elif stream.decode is not None:
            stream.frames = ()  # handed over: nobody else can take it under this attempt
        else:
            stream.enter(State.ENDED, now)

    def _on_refused(self, worker: Worker, report: Refused, now: float) -> None:
        stream = self._at(report)
        leg = stream.leg_on(worker.identity) if stream else None
        if stream is None or leg is None:
            return
        was_prefill = leg is stream.prefill
        self._legs.drop(stream, leg)
        stream.refused_by[worker.identity] = report.reason
        if was_prefill:
            stream.enter(State.QUEUED, now)
            self.queue.push(stream)
        else:
            stream.enter(State.HANDOFF, now)
            self._bind(stream, now)

    def _at(self, report: Ended | Refused | Progress | PrefillDone | FirstToken) -> Stream | None:
        stream = self.streams.get(report.sid)
        return stream if stream is not None and stream.attempt == report.attempt else None

    def _prefilling(self, worker: Worker, report: Progress | PrefillDone | FirstToken) -> Stream | None:
        stream = self._at(report)
        leg = stream.prefill if stream else None
        return stream if leg is not None and leg.worker == worker.identity else None

    def _dispatch(self, now: float) -> None:
        """Send queued streams to prefill workers, as far as those have room: what waits here can still be placed."""
        stuck: set[bool] = set()
        while (stream := self.queue.peek(stuck)) is not None:
            able = self._able(stream)
            willing = self._roomiest([worker for worker in able if worker.identity not in stream.refused_by], stream)
            if stream.deadline <= now:
                text = "the deadline passed in the queue"
                self._notify(stream, Rejected(stream.sid, stream.attempt, RejectCode.DEADLINE, text), now)
            elif not able and (too_long := self._too_long(stream, now)):
                self._retry(stream, too_long, now)  # the next Submit is rejected
            elif not able and self.registry.prefill_workers(stream.pooled):
                self.queue.discard(stream)  # too long for who is there, unlike others; `_sweep` brings it back
            elif not able:
                stuck.add(stream.pooled)  # nobody is there for it, nor for those behind it that want the same
            elif not willing:
                self._retry(stream, "; ".join(stream.refused_by.values()), now)
            else:
                home = self._home(stream, willing)
                with_room = filter(self.registry.has_stream_room, willing)
                candidates = [worker for worker in with_room if worker.has_prefill_room(stream.num_tokens)]
                if home is None and not candidates:
                    return
                self.queue.discard(stream)
                worker = home or self._policy.prefill(candidates, stream)
                self._legs.start_prefill(stream, worker, self._hands_over(worker, stream.room), now, bool(home))

    def _home(self, stream: Stream, willing: list[Worker]) -> Worker | None:
        """The worker where a sibling has the stream's prompt, or will: next to nothing is left to compute there."""
        assert stream.params is not None
        sibling = self.streams.get(stream.sibling) if stream.sibling else None
        if sibling is None or stream.params.prompt_logprobs >= 0:  # those are of a whole prompt, which each computes
            return None
        able = (worker for worker in willing if worker.shares_prompts and self.registry.has_stream_room(worker))
        return next((worker for worker in able if worker.identity == sibling.prefilled_by), None)

    def _bind(self, stream: Stream, now: float) -> None:
        """Choose the decode worker, as late as this. Where none has room the stream stays in HANDOFF: its lease bounds
        that. Where nobody who is left could take it over, and somebody could run it anew, it starts again."""
        if stream.prefill is None or not stream.frames:
            self._retry(stream, "the prompt was with an earlier scheduler", now)
            return
        owner = self.registry.workers[stream.prefill.worker]
        able = [worker for worker in self.registry.decode_workers(owner) if worker.fits(stream.room)]
        takers = [worker for worker in able if worker.identity not in stream.refused_by]
        if willing := self._roomiest(takers, stream):
            sibling = self.streams.get(stream.sibling) if stream.sibling else None
            where = sibling.decode.worker if sibling and sibling.decode else b""
            home = next((worker for worker in willing if worker.identity == where and worker.shares_prompts), None)
            self._legs.start_decode(stream, owner, home or self._policy.decode(willing, stream), now)
        elif stream.refused_by:
            self._retry(stream, "; ".join(stream.refused_by.values()), now)
        elif self._able(stream):
            self._retry(stream, f"nobody is left to take it over from {owner.name}", now)

    def _retry(self, stream: Stream, reason: str, now: float) -> None:
        """This attempt is over everywhere; the frontend continues it with the next one."""
        self._outbox.happened(EventKind.REQUEST_RETRIED, stream.id, reason)
        self._notify(stream, Retry(stream.sid, stream.attempt, reason), now)

    def _cancel(self, stream: Stream, message: str, now: float) -> None:
        """End it here; its frontend, which owns it, ends it for the client."""
        self._notify(stream, Cancelled(stream.sid, message), now)

    def _notify(self, stream: Stream, notice: Retry | Rejected | Cancelled, now: float) -> None:
        self._legs.cancel_all(stream)
        self.queue.discard(stream)
        stream.frames = ()
        stream.notice, stream.notice_at = notice, now
        stream.enter(State.RECOVERING, now)
        self._outbox.send(stream.frontend, notice)

    def _forget(self, stream: Stream) -> None:
        self.queue.discard(stream)
        del self.streams[stream.sid]

    def _sweep(self, stream: Stream, now: float) -> None:
        waited = now - stream.since
        match stream.state:
            case State.QUEUED:
                if min(waited, self._unserved_s(stream, now)) >= self._config.no_workers_s:
                    self._retry(stream, self.registry.lacking(), now)
                elif stream not in self.queue:
                    self.queue.push(stream)
            case State.PREFILLING if waited >= self._config.grace_s and not stream.frames:
                # Adopted, and can't be handed over: the prompt went with the scheduler that had it.
                self._retry(stream, "the prompt was with an earlier scheduler", now)
            case State.HANDOFF if stream.prefill is not None and stream.decode is None:
                self._bind(stream, now)
            case State.RECOVERING if stream.notice is not None and now - stream.notice_at >= NOTICE_RESEND_S:
                stream.notice_at = now
                self._outbox.send(stream.frontend, stream.notice)
            case State.ENDED if waited >= self._config.reconcile_after_s:
                # The frontend has closed it, or lost its last rows: then it needs to hear of it.
                self._retry(stream, "the end of the stream was lost", now)
            case State.CLAIMED if waited >= self._config.grace_s:
                self._retry(stream, "no worker holds it after a restart of the scheduler", now)


def _described(link: KVLink) -> str:
    if not link.transport:
        return f"can't read {link.owner}: {link.reason}"
    return f"reads {link.owner} through {link.transport}{f' ({link.reason})' if link.reason else ''}"
