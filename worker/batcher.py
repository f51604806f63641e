"""A worker's iterations: which streams enter the next step, with which tokens and blocks.

    StartPrefill ─► WAITING ─► RUNNING ──────────────► OVER              (continue_decode: until the stream ends;
                                                                          pooling: with the prompt's vector)
                       ▲          │ └─ first token ──► LEASED ─► OVER    (hands over: until the lease is consumed)
                       └──────────┘ preempted: recomputed from its tokens
    StartDecode ─► WAITING_KV (pulls.py) ─► KV_HERE ─► RUNNING ─► OVER
    While its grammar is being compiled a stream is COMPILING, before WAITING or KV_HERE (grammar_gate.py).

Events and a clock in, instructions out: `handle`, `schedule`, `complete` and `tick` append to `outbox`, which whoever
drives the batcher carries out. No sockets, no tensors, no time.time(). At most `depth` steps are in flight; results
come back in order and map through the stored plan. A stream's length limit is foreseen when a step is planned; its stop
tokens are found when the result arrives, and what a step in flight still computes for it is dropped then, while a fence
keeps its blocks from transfers until that step has passed.
"""

from collections.abc import Sequence

import numpy as np

from baton.kv_transfer.contract import PullDone
from baton.kv_transfer.leases import Lease, Leases
from baton.proto.config import BatchConfig, CacheConfig, LeaseConfig
from baton.proto.hashing import unpack_hashes
from baton.proto.lifecycle import FinishReason, Stage
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import (
    CancelCommand,
    CancelStream,
    Confirm,
    Ended,
    Finish,
    FirstRows,
    FirstToken,
    Gone,
    Holder,
    Holding,
    KVLink,
    Ledger,
    Load,
    Ok,
    Open,
    Peer,
    PrefillDone,
    Progress,
    Prompts,
    Refused,
    Settled,
    Sid,
    StartDecode,
    StartPrefill,
    Swapped,
    TokenLogprobs,
    Welcome,
)
from baton.worker.block_pool import BlockPool
from baton.worker.device_share import DeviceShare
from baton.worker.effects import Compiled, Effect, Emit, ToHolder, ToKeeper, ToScheduler
from baton.worker.grammar_gate import GrammarGate
from baton.worker.plan import StepPlan, StepResult
from baton.worker.pulls import Pulls
from baton.worker.request import RemoteKV, Request, State
from baton.worker.shared_prompts import SharedPrompts
from baton.worker.step_costs import StepCosts
from baton.worker.step_scheduler import Planned, StepScheduler
from baton.worker.swaps import Swaps
from baton.worker.tombstones import Tombstones

PREFILL, DECODE = "prefill", "decode"

Command = StartPrefill | StartDecode | CancelCommand
Event = (
    Welcome | Command | CancelStream | Open | Confirm | Settled | Ok | Gone | Swapped | Prompts | PullDone | Compiled
)


class Batcher:
    """All streams of one worker incarnation.

    `me` is this worker's own address, `blocks` are those that it owns; `max_model_len` bounds a sequence, and `costs`
    are those of this device's steps, where they are known. `shares_device`: it takes turns there with other workers.
    """

    def __init__(
        self,
        me: Peer,
        blocks: Sequence[int],
        max_model_len: int,
        cache: CacheConfig,
        batch: BatchConfig,
        lease: LeaseConfig,
        early_bind_tokens: int,
        costs: StepCosts | None = None,
        shares_device: bool = False,
    ) -> None:
        self.me = me
        self.outbox: list[Effect] = []
        self.pool = BlockPool(blocks, cache.enable_prefix_caching)
        self.leases = Leases(lease)
        self._block_size = cache.block_size
        self._max_model_len = min(max_model_len, len(blocks) * cache.block_size)
        self._early_bind_tokens = early_bind_tokens
        self._shared = SharedPrompts(enabled=not me.shared_pool)
        self._device = DeviceShare((batch.target_itl_ms or 0.0) / 1000, shares_device)
        self._steps = StepScheduler(
            self.pool, self.leases, cache.block_size, self._max_model_len, batch, costs, self._shared, self._device
        )
        self._swaps = Swaps(self.pool, self.outbox)
        self._pulls = Pulls(
            me,
            self.pool,
            self._swaps,
            cache.block_size,
            lease,
            self._shared,
            self.outbox,
            self._kv_ready,
            self._forget,
            self._steps.has_room_for,
        )
        self._gate = GrammarGate(self.outbox)
        self._requests: dict[tuple[Sid, str], Request] = {}
        self._leased: dict[int, Request] = {}
        self._handed_over: tuple[float, list[int]] = (0.0, [])
        """When a step ended that computed prompts for others to the end, and under which leases."""
        self._tombstones = Tombstones(lease.remember_s)
        self._arrivals = 0
        self.epoch = 0
        """The highest that a command or a Welcome had."""
        self._last_cmd_seq = 0
        self.computed_tokens = 0
        self.generated_tokens = 0
        self.pooled_vectors = 0

    def handle(self, event: Event, frames: tuple[bytes | memoryview, ...], now: float) -> None:
        """Take in one message (with its extra frames) or the end of a transfer."""
        match event:
            case StartPrefill() | StartDecode() | CancelCommand():
                self._command(event, frames, now)
            case Welcome():
                self._obey(event.epoch)
            case CancelStream():
                self._cancel_stream(event, now)
            case Open():
                answer = self._as_owner(event) or self.leases.open(event.lease, event.holder, now)
                self.outbox.append(ToHolder(event.holder, answer))
            case Confirm():
                self._confirm(event, now)
            case Settled():
                key = self._lease_key(event)
                self._pulls.settled(key, event.num_tokens, event.blocks, event.first_rows, now)
            case Ok():
                self._pulls.ok(self._lease_key(event), event.first_rows, now)
            case Gone():
                self._pulls.gone(self._lease_key(event))
            case Swapped():
                if not self._swaps.swapped(event):
                    self._pulls.swapped(event, now)
            case Prompts():
                self._device.prompts_since = event.since
            case PullDone():
                self._pulls.pull_done(event, now)
            case Compiled():
                for request in self._gate.answer(event):
                    self._fail(request, event.error)
        self._pulls.reserve(now)

    def _obey(self, epoch: int) -> None:
        """A restarted scheduler counts its commands from the beginning."""
        if epoch > self.epoch:
            self.epoch, self._last_cmd_seq = epoch, 0

    def _command(self, command: Command, frames: tuple[bytes | memoryview, ...], now: float) -> None:
        if command.epoch < self.epoch:
            return
        self._obey(command.epoch)
        self._last_cmd_seq = max(self._last_cmd_seq, command.cmd_seq)
        if isinstance(command, CancelCommand):
            self._cancel(command.sid, command.attempt, now)
            return
        if not self._tombstones.allows(command.sid, command.attempt):
            return
        self._cancel(command.sid, command.attempt - 1, now)
        leg = PREFILL if isinstance(command, StartPrefill) else DECODE
        if (command.sid, leg) in self._requests:
            return
        request = self._new_request(command, leg, frames, now)
        if reason := self._impossible(request):
            self.outbox.append(ToScheduler(Refused(command.sid, command.attempt, leg, reason)))
        elif isinstance(command, StartPrefill):
            self._start_prefill(request, command, now)
        else:
            self._start_decode(request, command, now)

    def _new_request(
        self, command: StartPrefill | StartDecode, leg: str, frames: tuple[bytes | memoryview, ...], now: float
    ) -> Request:
        tokens = np.frombuffer(frames[0], dtype=np.int32).tolist()
        self._arrivals += 1
        return Request(
            sid=command.sid,
            attempt=command.attempt,
            leg=leg,
            prompt_len=command.prompt_len,
            params=command.params,
            reply_to=command.reply_to,
            tokens=tokens,
            arrived=len(tokens),
            chain=unpack_hashes(frames[1]),
            came_s=now,
            priority=command.priority,
            order=self._arrivals,
            emitted=len(tokens) - command.prompt_len,
        )

    def _impossible(self, request: Request) -> str | None:
        """Why this worker could never serve the request."""
        if request.leg == PREFILL and self._over_already(request):
            return None
        if len(request.tokens) + min(request.params.max_tokens, 1) > self._max_model_len:
            return f"{len(request.tokens)} tokens and what is to follow: this worker holds {self._max_model_len}"
        return None

    def _over_already(self, request: Request) -> bool:
        """Whether the frontend has all its tokens from earlier attempts: only the word that it is over was lost."""
        full = len(request.tokens) == self._max_model_len
        return request.num_output > 0 and (request.num_output >= request.params.max_tokens or full)

    def _start_prefill(self, request: Request, command: StartPrefill, now: float) -> None:
        request.hands_over = not command.continue_decode and not command.params.pooling
        request.ledger = Ledger(prefill_worker=self.me.worker, stages={Stage.STARTED: now})
        request.prompt_logprobs = bytearray() if request.params.prompt_logprobs >= 0 else None
        if not request.ends_with_prefill:
            request.ledger.decode_worker, request.ledger.transport = self.me.worker, "local"
        self._requests[request.key] = request
        if self._over_already(request):
            self._emit(request, (), (), FinishReason.LENGTH)
            self._over(request, ended=True)
            return
        self._gate.ask(request)
        self._gate.enter(request, self._steps.enqueue)

    def _start_decode(self, request: Request, command: StartDecode, now: float) -> None:
        request.ledger = Ledger(decode_worker=self.me.worker, stages={Stage.BOUND: now})
        if command.reported_at:
            request.ledger.stages[Stage.REPORTED] = command.reported_at
        holder = Holder(self.me.worker, self.me.incarnation, command.sid, command.attempt)
        if command.owner.incarnation == self.me.incarnation:
            self._take_over(request, command, holder, now)
            return
        request.state = State.WAITING_KV
        request.remote = RemoteKV(
            lease=command.lease,
            owner=command.owner,
            holder=holder,
            total=len(request.tokens),
            source=command.blocks,
            settled=command.num_tokens,
            first_rows=command.first_rows,
        )
        self._requests[request.key] = request
        self._gate.ask(request)
        self._pulls.start(request, now)

    def _take_over(self, request: Request, command: StartDecode, holder: Holder, now: float) -> None:
        """Both legs on one worker: references pass from the lease to the stream, no byte moves."""
        answer, lease = self.leases.confirm(command.lease, holder, now)
        if not isinstance(answer, Ok) or lease is None:
            self.outbox.append(
                ToScheduler(Refused(request.sid, request.attempt, DECODE, "its own prefill is not done"))
            )
            return
        source = self._leased.pop(lease.id)
        assert lease.first_rows is not None
        request.blocks, source.blocks = source.blocks, []
        request.published = source.published
        request.ledger.transport = "local"
        request.ledger.stages[Stage.CONFIRMED] = now
        self._requests[request.key] = request
        self._gate.ask(request)
        self._over(source, ended=True)
        self._continue(request, lease.first_rows)

    def _kv_ready(self, request: Request) -> None:
        """The prompt's KV is here and confirmed: publish it and decode on."""
        assert request.remote is not None
        assert request.remote.first_rows is not None
        self._continue(request, request.remote.first_rows)

    def _continue(self, request: Request, rows: FirstRows) -> None:
        request.scheduled = request.settled = len(request.tokens)
        self._publish(request)
        request.tokens += rows.tokens
        request.first_rows = rows
        if len(request.tokens) < self._max_model_len:
            self._gate.enter(request, self._steps.arrive)
        else:  # the owner, who is asked for no more than one token, had no reason to end it
            self._emit(request, (), (), FinishReason.LENGTH)
            self._over(request, ended=True)

    def _fail(self, request: Request, message: str) -> None:
        """End a stream that can't go on, and tell its client why."""
        self._emit(request, (), (), FinishReason.ERROR, message)
        self._drop(request)
        self.outbox.append(ToScheduler(Ended(request.sid, request.attempt, request.leg)))

    def _cancel_stream(self, event: CancelStream, now: float) -> None:
        for leg in (PREFILL, DECODE):
            request = self._requests.get((event.sid, leg))
            if request is not None and request.attempt <= event.attempt:
                self.outbox.append(ToScheduler(Ended(event.sid, request.attempt, leg)))
        self._cancel(event.sid, event.attempt, now)

    def _cancel(self, sid: Sid, attempt: int, now: float) -> None:
        """Free what this attempt and older ones hold, and refuse their commands from now on."""
        self._tombstones.bury(sid, attempt, now)
        for leg in (PREFILL, DECODE):
            request = self._requests.get((sid, leg))
            if request is not None and request.attempt <= attempt:
                self._drop(request)

    def _drop(self, request: Request) -> None:
        """End a request in whatever state it is."""
        match request.state:
            case State.WAITING | State.KV_HERE | State.RUNNING:
                self._steps.remove(request)
            case State.WAITING_KV:
                self._pulls.cancel(request)
            case State.LEASED:
                assert request.lease is not None
                del self._leased[request.lease.id]
        self._over(request)

    def _over(self, request: Request, ended: bool = False) -> None:
        """Give everything back. Blocks that a step in flight may write carry its fence."""
        if request.lease is not None and request.lease.live:
            self.leases.cancel(request.lease)
        self.pool.release(request.blocks, self._steps.fence(request))
        request.blocks = []
        request.state = State.OVER
        self._forget(request)
        if ended:
            self.outbox.append(ToScheduler(Ended(request.sid, request.attempt, request.leg)))

    def _forget(self, request: Request) -> None:
        self._gate.forget(request)
        self._shared.release(request)
        del self._requests[request.key]

    def _lease_key(self, message: Settled | Ok | Gone) -> tuple[int, int]:
        request = self._requests.get((message.holder.sid, DECODE))
        if request is None or request.remote is None or request.remote.holder != message.holder:
            return 0, 0
        return request.remote.owner.incarnation, message.lease

    def _as_owner(self, message: Open | Confirm) -> Gone | None:
        """Gone when the lease belonged to an earlier incarnation of this worker."""
        return None if message.owner_incarnation == self.me.incarnation else Gone(message.holder, message.lease)

    def _confirm(self, event: Confirm, now: float) -> None:
        gone = self._as_owner(event)
        answer, consumed = (gone, None) if gone else self.leases.confirm(event.lease, event.holder, now, event.targets)
        self.outbox.append(ToHolder(event.holder, answer))
        if consumed is not None:
            self._consumed(consumed, event.targets)

    def _consumed(self, lease: Lease, targets: tuple[int, ...]) -> None:
        """The holder has a copy of the blocks, or is to have them for its targets."""
        request = self._leased.pop(lease.id)
        if targets:
            assert lease.holder is not None
            key = self.me.incarnation, lease.id
            self._swaps.give(key, request.blocks, lease.holder, targets, self.leases.oldest)
            request.blocks = []
        self._over(request, ended=True)

    def tick(self, now: float) -> None:
        """Sweep what the clock ends: leases, renewals, tombstones."""
        for lease in self.leases.expire(now):
            request = self._leased.pop(lease.id)
            self._over(request)
            self.outbox.append(ToScheduler(Ended(request.sid, request.attempt, PREFILL, "the lease on its KV expired")))
        self._pulls.tick(now)
        self._pulls.reserve(now)
        self._tombstones.sweep(now)

    def next_deadline(self) -> float:
        """When `tick` has something to do, or `schedule` that it has put off; infinity when never."""
        parts = (self.leases, self._pulls, self._tombstones)
        return min(self._steps.held_until, *(part.next_deadline() for part in parts))

    def schedule(self, now: float) -> StepPlan | None:
        """The next step, or None when `depth` are in flight, nothing can run, or it is too early."""
        plan = self._steps.schedule(now, self._read_since())
        if plan is not None:
            for item in [item for item in self._steps.planned_last if item.request.hands_over and item.samples]:
                lease = item.request.lease
                if lease is not None and lease.holder is None and self._binds_early(item.request):
                    self._report_progress(item.request, now)  # its reader can make room while the last chunk runs
        if self._device.shared and (news := self._device.news(self._steps.prompts_since)):
            self.outbox.append(ToKeeper(news))
        return plan

    def _read_since(self) -> float | None:
        """When the last prompts were computed that others are to copy; None once they all have."""
        since, leases = self._handed_over
        return since if any(lease in self._leased for lease in leases) else None

    def complete(self, result: StepResult, now: float) -> None:
        """Take in the oldest step's result."""
        planned = self._steps.completed(result)
        self._handed_over = now, []
        self.computed_tokens += sum(item.end - item.start for item in planned if not item.decodes)
        for index, item in enumerate(planned):
            if item.request.state is State.OVER:
                continue
            if item.residency != item.request.residency or item.request.state is not State.RUNNING:
                # Preempted since: a transfer may have refilled its blocks while the step still read them.
                item.request.placeholders -= item.samples
                continue
            self._settle(item, now)
            if index in result.prompt_logprobs:
                item.request.learn_prompt_logprobs(item.start, result.prompt_logprobs[index])
            if index in result.failed:
                self._fail(item.request, result.failed[index])
            elif index in result.vectors:
                self._pooled(item.request, result.vectors[index], result.sampled_s or now)
            elif item.samples:
                logprobs = result.logprobs.get(index, ())
                self._sampled(item.request, result.tokens[index], logprobs, result.sampled_s or now)
        self._pulls.reserve(now)

    def _settle(self, item: Planned, now: float) -> None:
        """The row's KV is in its blocks: publish full ones, and tell whoever reads along."""
        request = item.request
        request.settled = item.end
        self._publish(request)
        if not item.decodes:
            request.computed += item.end - item.start
        if not item.samples and self._binds_early(request):
            self._report_progress(request, now)

    def _binds_early(self, request: Request) -> bool:
        return request.hands_over and len(request.tokens) >= self._early_bind_tokens

    def _publish(self, request: Request) -> None:
        full = request.settled // self._block_size
        if not self.pool.caching or full <= request.published:
            return
        hashes = request.block_hashes(self._block_size, full)
        for index in range(request.published, full):
            self.pool.publish(request.blocks[index], hashes[index])
        request.published = full

    def _report_progress(self, request: Request, now: float) -> None:
        lease = request.lease
        assert lease is not None
        full = request.settled // self._block_size
        self.leases.settle(lease, full * self._block_size, request.blocks[:full], None, now)
        if lease.holder is not None:
            self.outbox.append(ToHolder(lease.holder, self.leases.settled_message(lease, lease.holder)))
            return
        progress = Progress(
            sid=request.sid,
            attempt=request.attempt,
            lease=lease.id,
            num_tokens=lease.num_tokens,
            total_tokens=len(request.tokens),
            blocks=lease.blocks,
            tokens_per_s=self._steps.tokens_per_s,
        )
        self.outbox.append(ToScheduler(progress))

    def _sampled(self, request: Request, tokens: list[int], logprobs: tuple[TokenLogprobs, ...], now: float) -> None:
        """Accept sampled tokens up to the stream's end, send them, and move the request on."""
        first_of_leg = not request.generated
        request.placeholders -= 1
        reason: FinishReason | None = None
        taken = 0
        for token in tokens:
            request.tokens.append(token)
            taken += 1
            reason = self._finish_reason(request, token)
            if reason:
                break
        self.generated_tokens += taken
        request.generated = True
        if first_of_leg and request.leg == PREFILL:
            self._note_prefill(request, now)
        self._emit(request, tuple(tokens[:taken]), logprobs[:taken], reason)
        if reason:
            self._finished(request)
        elif request.hands_over:
            self._hand_over(request, FirstRows(tuple(tokens[:taken]), logprobs[:taken]), now)
        elif first_of_leg and request.leg == PREFILL:
            self.outbox.append(ToScheduler(FirstToken(request.sid, request.attempt)))

    def _pooled(self, request: Request, vector: bytes, now: float) -> None:
        """The prompt's vector is all that was wanted: it goes to the frontend with the end of the stream."""
        request.placeholders -= 1
        self.pooled_vectors += 1
        self._note_prefill(request, now)
        self._emit(request, (), (), FinishReason.STOP, vector=vector)
        self._finished(request)

    def _note_prefill(self, request: Request, now: float) -> None:
        request.ledger.computed_tokens = request.computed
        request.ledger.stages[Stage.SAMPLED] = now

    def _finish_reason(self, request: Request, token: int) -> FinishReason | None:
        if token in request.params.stop_token_ids:
            return FinishReason.STOP
        output = len(request.tokens) - request.prompt_len
        full = len(request.tokens) >= self._max_model_len and not request.hands_over  # another's context may be longer
        if output >= request.params.max_tokens or full:
            return FinishReason.LENGTH
        return None

    def _emit(
        self,
        request: Request,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        reason: FinishReason | None,
        message: str = "",
        vector: bytes = b"",
    ) -> None:
        if request.first_rows is not None:
            tokens = request.first_rows.tokens + tokens
            logprobs = request.first_rows.logprobs + logprobs
            request.first_rows = None
        finish = Finish(reason, len(request.tokens) - request.prompt_len, message) if reason else None
        ledger, request.ledger = request.ledger, Ledger()
        prompt_logprobs = None
        if tokens and request.prompt_logprobs is not None:
            prompt_logprobs = PromptLogprobs(request.params.prompt_logprobs, bytes(request.prompt_logprobs))
            request.prompt_logprobs = None
        self.outbox.append(
            Emit(
                reply_to=request.reply_to,
                sid=request.sid,
                attempt=request.attempt,
                pos=request.emitted,
                tokens=tokens,
                logprobs=logprobs,
                finish=finish,
                ledger=ledger if ledger != Ledger() else None,
                prompt_logprobs=prompt_logprobs,
                vector=vector,
            )
        )
        request.emitted += len(tokens)

    def _finished(self, request: Request) -> None:
        self._steps.leave(request)
        self._over(request, ended=True)

    def _hand_over(self, request: Request, rows: FirstRows, now: float) -> None:
        """The leg is done: the blocks wait under the lease for their reader."""
        lease = request.lease
        assert lease is not None
        self._steps.leave(request)
        request.state = State.LEASED
        prompt_tokens = len(request.tokens) - len(rows.tokens)
        self.leases.settle(lease, prompt_tokens, request.blocks, rows, now)
        self._leased[lease.id] = request
        self._handed_over[1].append(lease.id)
        if lease.holder is not None:
            self.outbox.append(ToHolder(lease.holder, self.leases.settled_message(lease, lease.holder)))
        self.outbox.append(ToScheduler(_prefill_done(lease)))
        if lease.targets and lease.holder is not None:
            _, consumed = self.leases.confirm(lease.id, lease.holder, now)
            assert consumed is lease
            self._consumed(lease, lease.targets)

    def links(self) -> tuple[KVLink, ...]:
        """Workers that blocks come from without a transport."""
        return tuple(KVLink(owner, "local") for owner in sorted(self._pulls.swapped_with))

    def holdings(self) -> tuple[Holding, ...]:
        """Every stream that this worker keeps something for."""
        return tuple(
            Holding(r.sid, r.attempt, "prefill" if r.hands_over else "decode") for r in self._requests.values()
        )

    def load(self, with_holdings: bool) -> Load:
        """The report for the scheduler."""
        return Load(
            last_cmd_seq=self._last_cmd_seq,
            used_blocks=self.pool.num_used,
            free_blocks=self.pool.num_free,
            running=len(self._steps.running),
            waiting=len(self._steps.waiting) + len(self._steps.kv_here) + len(self._pulls) + len(self._gate),
            queued_tokens=self._steps.queued_tokens,
            leases=self.leases.num_live,
            computed_tokens=self.computed_tokens,
            cached_tokens=self._steps.cached_tokens,
            pulled_tokens=self._pulls.pulled_tokens,
            generated_tokens=self.generated_tokens,
            preemptions=self._steps.preemptions,
            holdings=self.holdings() if with_holdings else None,
            pooled_vectors=self.pooled_vectors,
        )

    def resend_ready(self) -> None:
        """After a new hello: tell the scheduler again of leases that nobody has opened."""
        self.outbox += [ToScheduler(_prefill_done(lease)) for lease in self.leases.ready_unopened()]

    @property
    def steps_in_flight(self) -> int:
        """Plans whose results have not come back."""
        return self._steps.steps_in_flight


def _prefill_done(lease: Lease) -> PrefillDone:
    assert lease.first_rows is not None
    return PrefillDone(lease.sid, lease.attempt, lease.id, lease.num_tokens, lease.blocks, lease.first_rows)
