"""Which streams enter a worker's next step, with which tokens and which blocks.

    enqueue ─► waiting ─► running ─► leave         (prefill, or recompute after a preemption: blocks for all its tokens)
                  ▲          │
                  └──────────┘ preempted: the latest arrival gives way when a running stream needs a block
    arrive ──► kv_here ─► running                  (the KV came from another worker: it needs only a slot)

Several that begin alike compute it once: the others stay waiting until it has settled (shared_prompts.py).

A step takes streams that decode first, so that none waits for a prompt, whatever its rank, then fills its token budget
with chunks of prompts in order of arrival; while streams run the budget follows a target time (step_costs.py). With
`prompts_first` it is the other way round. At most `depth` steps are in flight; their results come back in order. While
streams run, the next one is planned when the device is about to need it (lead.py), or later where another worker's
prompts need the device more (device_share.py). A stream whose next token depends on its last one by more than the model
(a grammar, bad words) is planned again only once that one is known, so at depth 2 it enters every other step.
"""

import math
from collections import deque
from dataclasses import dataclass

from baton.kv_transfer.leases import Leases
from baton.proto.config import BatchConfig
from baton.proto.lifecycle import Stage
from baton.worker.block_pool import BlockPool
from baton.worker.device_share import DeviceShare
from baton.worker.lead import Lead
from baton.worker.plan import Row, SlotInit, StepPlan, StepResult
from baton.worker.request import Request, State
from baton.worker.shared_prompts import SharedPrompts
from baton.worker.step_costs import StepCosts


@dataclass(slots=True)
class Planned:
    """One row of a plan in flight, with what it meant when it was planned."""

    request: Request
    residency: int
    start: int
    end: int
    samples: bool
    """Whether a result comes back: a token, or a vector."""

    @property
    def decodes(self) -> bool:
        """Whether the row computes a token that this attempt sampled."""
        return self.start >= self.request.arrived


@dataclass(slots=True)
class InFlight:
    """A step whose result has not come back."""

    plan: StepPlan
    planned: list[Planned]
    expected_s: float
    """What it should take; 0 when that is not known."""
    follows: bool
    """It was planned while another was in flight."""
    copied: list[int]
    """Blocks that it copies before it computes anything, one reference taken on each."""

    @property
    def has_prompts(self) -> bool:
        """Whether a row is more than one token: what such steps take is what the costs are learned from."""
        return self.plan.num_tokens > len(self.planned)


class StepScheduler:
    """The sets of streams that can enter steps, and the steps in flight.

    `max_model_len` bounds a sequence; without `costs` a step may always take the whole token budget.
    """

    def __init__(
        self,
        pool: BlockPool,
        leases: Leases,
        block_size: int,
        max_model_len: int,
        batch: BatchConfig,
        costs: StepCosts | None,
        shared: SharedPrompts,
        device: DeviceShare,
    ) -> None:
        self._pool = pool
        self._shared = shared
        self._device = device
        self._leases = leases
        self._block_size = block_size
        self._max_model_len = max_model_len
        self._max_tokens = batch.max_num_batched_tokens
        self._depth = batch.depth or 1
        self._prompts_first = batch.prompts_first
        self._target_s = (batch.target_itl_ms or 0.0) / 1000
        self._costs = costs if self._target_s else None
        self.waiting: list[Request] = []  # sorted by rank
        self.kv_here: deque[Request] = deque()
        self.running: list[Request] = []  # sorted by rank
        self._free_slots = list(range(batch.max_num_seqs - 1, -1, -1))
        self._in_flight: deque[InFlight] = deque()
        self._lead = Lead()
        self.held_until = math.inf
        """When the next step may be planned, while it is too early for it; infinity otherwise."""
        self._last_sampled_s = 0.0
        self._new_slots: list[SlotInit] = []
        self._copies: list[tuple[int, int]] = []
        self._step = 0
        self.cached_tokens = 0
        self.preemptions = 0
        self.tokens_per_s = 1.0
        """Prompt tokens a second, as the last step with a prompt computed them."""

    def schedule(self, now: float, read_since: float | None = None) -> StepPlan | None:
        """The next step, or None when `depth` are in flight, nothing can run, or it is too early. `read_since`: when
        prompts were computed whose readers are at work."""
        self.held_until = math.inf
        if len(self._in_flight) >= self._depth:
            return None
        if now < self._lead.plan_at and self._can_wait():
            self.held_until = self._lead.plan_at
            return None
        if self._in_flight and read_since is not None and now < (at := self._lead.answers_until(read_since)):
            self.held_until = at
            return None
        if (begins_at := self._begins_at(now)) > now:
            self.held_until = begins_at
            return None
        self._new_slots, self._copies = [], []
        rows: list[Row] = []
        planned: list[Planned] = []
        budget = self._budget(now)
        preemptions = self.preemptions
        decoding: list[Request] = []
        prompts: list[Request] = []
        for request in self.running:
            (decoding if _decodes(request) else prompts).append(request)
        if self._prompts_first:
            budget = self._add_rows(prompts, budget, rows, planned)
            budget = self._admit_prompts(budget, rows, planned, now)
        budget = self._add_rows(decoding, budget, rows, planned)
        while self.kv_here and self._admit_decode(self.kv_here[0]):
            budget -= self._add_row(self.kv_here.popleft(), max(budget, 1), rows, planned)
        if not self._prompts_first:
            budget = self._add_rows(prompts, budget, rows, planned)
        if self.preemptions == preemptions:
            self._admit_prompts(budget, rows, planned, now)
        if not rows:
            gave_way = self.preemptions > preemptions and not self._in_flight
            return self.schedule(now) if gave_way else None
        self._step += 1
        for item in planned:
            item.request.last_step = self._step
            if item.decodes and not item.request.stepped:
                item.request.stepped = True
                item.request.ledger.stages[Stage.STEPPED] = now
        plan = StepPlan(self._step, rows, self._new_slots, self._copies)
        copied = [source for source, _ in self._copies]
        step = InFlight(plan, planned, self._expected_s(planned), bool(self._in_flight), copied)
        self._in_flight.append(step)
        self._lead.planned(now, step.expected_s)
        return plan

    def _can_wait(self) -> bool:
        """Whether the device has work while streams run: then a prompt that comes later may still be in the step."""
        if not self._in_flight or self._costs is None or self._prompts_first:
            return False
        return any(self._goes_on(request) for request in self.running)

    def _begins_at(self, now: float) -> float:
        """When a step should begin, as far as other workers' prompts are concerned; infinity: when one has ended."""
        if self._costs is None or self._device.prompts_since is None or self._takes_prompts():
            return now
        if self._in_flight:
            return math.inf
        decoding = self._decoding()
        if not decoding:
            return now
        step_s = self._costs.seconds(len(decoding), sum(request.total for request in decoding))
        return self._device.begins_at(step_s, now)

    def _takes_prompts(self) -> bool:
        """Whether the next step will have some. One that waits for room has not."""
        if any(request.total - request.scheduled > 1 for request in self.running):
            return True
        first = next((request for request in self.waiting if not self._is_awaited(request)), None)
        if first is None or not self._free_slots:
            return False
        return self._has_room(-(-len(first.tokens) // self._block_size))

    def _has_room(self, blocks: int) -> bool:
        """Each running stream may soon want a block; without the spare, admission and preemption would alternate."""
        return blocks + len(self.running) <= self._pool.num_free

    def has_room_for(self, request: Request, blocks: int) -> bool:
        """Whether a stream whose KV comes from elsewhere may have so many blocks. One that was preempted comes back
        before those behind it, unless those before it would keep it out in any case."""
        if not self._has_room(blocks):
            return False
        first = next((r for r in self.waiting if r.preemptions and not self._is_awaited(r)), None)
        if first is None or request.rank < first.rank:
            return True
        ahead = [r for r in self.running if r.rank < first.rank]
        needed = -(-len(first.tokens) // self._block_size) + len(ahead)
        return sum(len(r.blocks) for r in ahead) + needed > self._pool.num_blocks

    def _decoding(self) -> list[Request]:
        """Streams whose next token a step would compute."""
        return [r for r in self.running if self._goes_on(r)] + list(self.kv_here)

    def _add_rows(self, requests: list[Request], budget: int, rows: list[Row], planned: list[Planned]) -> int:
        """Plan running requests' next tokens; what is left of the budget."""
        for request in requests:
            if request.state is State.RUNNING and budget > 0:
                budget -= self._add_row(request, budget, rows, planned)
        return budget

    def _admit_prompts(self, budget: int, rows: list[Row], planned: list[Planned], now: float) -> int:
        """Fill the budget with waiting prompts, as far as there is room for them; what is left of it."""
        index = 0
        while budget > 0 and index < len(self.waiting):
            request = self.waiting[index]
            if self._is_awaited(request):
                index += 1
                continue
            if not self._admit_prefill(request, now):
                break
            del self.waiting[index]
            budget -= self._add_row(request, budget, rows, planned)
        return budget

    def _budget(self, now: float) -> int:
        """Tokens of the next step."""
        if self._costs is None:
            return self._max_tokens
        prompt = next((r for r in [*self.running, *self.waiting] if r.total - r.scheduled > 1), None)
        if prompt is None:
            return self._max_tokens
        decoding = self._decoding()
        if not decoding:
            return self._max_tokens if self._prompts_first else self._filling(self._costs)
        keys = sum(request.total for request in decoding)
        behind = max(0, self.queued_tokens - (prompt.total - prompt.scheduled))
        budget = self._costs.budget(len(decoding), keys, prompt.scheduled, behind, self._waited(now), self._target_s)
        return min(budget, self._max_tokens)

    def _waited(self, now: float) -> float:
        """Seconds since the next prompt that has not begun was sent here; 0 without one."""
        return next((now - request.came_s for request in self.waiting if not self._is_awaited(request)), 0.0)

    def _filling(self, costs: StepCosts) -> int:
        """Tokens of the next prompts: as many prompts as fill the device, or a piece of a long one."""
        tokens = 0
        for request in [*self.running, *self.waiting]:
            if tokens >= costs.full_tokens:
                break
            tokens += request.total - request.scheduled
        return min(tokens, costs.best_tokens, self._max_tokens)

    def _expected_s(self, planned: list[Planned]) -> float:
        if self._costs is None:
            return 0.0
        tokens = keys = pairs = 0
        for item in planned:
            count = item.end - item.start
            tokens += count
            if count == 1:
                keys += item.end
            else:
                pairs += count * item.start
        return self._costs.seconds(tokens, keys, pairs)

    def _add_row(self, request: Request, budget: int, rows: list[Row], planned: list[Planned]) -> int:
        """Plan the request's next tokens; returns how many. Preempts the latest arrivals when blocks run out."""
        count = min(request.total - request.scheduled, budget)
        if count <= 0 or self._foreseen_end(request) or request.waits_for_token:
            return 0
        end = request.scheduled + count
        new_blocks = self._grow(request, end, planned)
        if new_blocks is None:
            return 0
        samples = end == request.total
        pools, mean_of = request.pools(count, samples)
        from_device = end > len(request.tokens)
        start = request.scheduled
        rows.append(
            Row(
                slot=request.slot,
                start=start,
                num_tokens=count,
                tokens=[] if from_device else request.tokens[start:end],
                from_device=from_device,
                new_blocks=new_blocks,
                samples=samples and not mean_of,
                output_index=request.num_output,
                targets=request.targets(start, end),
                pools=pools,
                mean_of=mean_of,
            )
        )
        planned.append(Planned(request, request.residency, start, end, samples))
        request.scheduled = end
        request.placeholders += samples
        return count

    def _goes_on(self, request: Request) -> bool:
        """Whether it is a stream that waits for its next token."""
        return _decodes(request) and not self._foreseen_end(request)

    def _foreseen_end(self, request: Request) -> bool:
        """Whether the steps already planned bring the stream, or this leg of it, to its end."""
        if request.ends_with_prefill:
            return bool(request.placeholders)
        return request.num_output >= request.params.max_tokens or request.total >= self._max_model_len

    def _grow(self, request: Request, end: int, planned: list[Planned]) -> list[int] | None:
        """Blocks for the tokens up to `end`, or None when the request itself had to give way."""
        missing = -(-end // self._block_size) - len(request.blocks)
        if missing <= 0:
            return []
        while (blocks := self._pool.allocate(missing)) is None:
            victim = self._victim(planned) or request
            self._preempt(victim)
            if victim is request:
                return None
        request.blocks += blocks
        return blocks

    def _victim(self, planned: list[Planned]) -> Request | None:
        """The latest arrival that is neither in the step being planned nor about to leave."""
        in_step = {item.request.key for item in planned}
        for request in reversed(self.running):
            if request.key not in in_step and not (request.ends_with_prefill and request.placeholders):
                return request
        return None

    @property
    def planned_last(self) -> list[Planned]:
        """The rows of the step that was planned last."""
        return self._in_flight[-1].planned

    @property
    def steps_in_flight(self) -> int:
        """Plans whose results have not come back."""
        return len(self._in_flight)

    @property
    def prompts_since(self) -> float | None:
        """When the oldest prompt came that the steps in flight compute; None without one."""
        steps = [step for step in self._in_flight if step.has_prompts]
        return min((item.request.came_s for step in steps for item in step.planned if not item.decodes), default=None)

    @property
    def queued_tokens(self) -> int:
        """Prompt tokens not yet given to a step."""
        prompts = [r for r in self.running if not r.generated and r.remote is None]
        return sum(
            1 if self._is_awaited(request) else request.total - request.scheduled
            for request in [*self.waiting, *prompts]
        )

    def _preempt(self, request: Request) -> None:
        """Take the blocks away; the stream is computed again from its tokens, most of them from the prefix cache."""
        self.leave(request)
        self._shared.release(request)
        self._pool.release(request.blocks, self.fence(request))
        request.blocks = []
        if request.lease is not None:
            # Its holder may have read blocks that are about to be reused: a new lease, never the same again.
            self._leases.cancel(request.lease)
            request.lease = None
        request.scheduled = request.settled = request.published = 0
        request.preemptions += 1
        request.ledger.preemptions = request.preemptions
        self.preemptions += 1
        self.enqueue(request)

    def enqueue(self, request: Request) -> None:
        """A request whose tokens are to be computed; it also returns here when it is preempted."""
        request.state = State.WAITING
        index = len(self.waiting)
        while index and self.waiting[index - 1].rank > request.rank:
            index -= 1
        self.waiting.insert(index, request)

    def _is_awaited(self, request: Request) -> bool:
        """Whether another stream is computing what this one begins with, all but its last token."""
        owner = self._owner(request)
        return owner is not None and owner.settled < request.reusable

    def _owner(self, request: Request) -> Request | None:
        """Who computes or has what this one begins with, all but the last token, which everybody computes: its logits
        are what is wanted. None also where the logits of more are wanted."""
        length = len(request.tokens) - 1
        return self._shared.owner(request, length) if request.reusable == length else None

    def _admit_prefill(self, request: Request, now: float) -> bool:
        """Move a waiting request into the running set when a slot and blocks for all its tokens are there."""
        if not self._free_slots or request.placeholders:
            return False
        owner = self._owner(request)
        known = self._known_blocks(request, owner)
        fresh = -(-len(request.tokens) // self._block_size) - len(known)
        blocks = self._pool.allocate(fresh) if self._has_room(fresh) else None
        if blocks is None:
            self._pool.release(known)
            return False
        request.blocks = known + blocks
        request.published = len(known)
        request.scheduled = request.settled = len(known) * self._block_size
        if owner is not None:
            self._copy_tail(request, owner)
        self._shared.claim(request, len(request.tokens) - 1)
        if request.preemptions:
            request.ledger.recomputed_tokens += len(request.tokens) - request.scheduled
        else:
            request.ledger.cached_tokens = request.scheduled
            request.ledger.stages[Stage.SCHEDULED] = now
        self.cached_tokens += request.scheduled
        if request.hands_over:
            request.lease = self._leases.create(request.sid, request.attempt)
        self._enter_running(request)
        return True

    def _known_blocks(self, request: Request, owner: Request | None) -> list[int]:
        """Full blocks of what it begins with, one reference taken on each: the owner's, or cached ones."""
        full = request.reusable // self._block_size
        if owner is None:
            return self._pool.match(request.block_hashes(self._block_size, full))
        self._pool.share(owner.blocks[:full])
        return owner.blocks[:full]

    def _copy_tail(self, request: Request, owner: Request) -> None:
        """The owner fills its last block with tokens of its own: the step copies it before it computes anything."""
        full = request.published
        if full * self._block_size < request.reusable:
            self._pool.share([owner.blocks[full]])
            self._copies.append((owner.blocks[full], request.blocks[full]))
            request.scheduled = request.settled = request.reusable

    def _admit_decode(self, request: Request) -> bool:
        if not self._free_slots:
            return False
        self._enter_running(request)
        return True

    def _enter_running(self, request: Request) -> None:
        request.state = State.RUNNING
        request.residency += 1
        request.slot = self._free_slots.pop()
        index = len(self.running)
        while index and self.running[index - 1].rank > request.rank:
            index -= 1
        self.running.insert(index, request)
        self._new_slots.append(
            SlotInit(
                slot=request.slot,
                sid=request.sid,
                attempt=request.attempt,
                params=request.params,
                prompt_len=request.prompt_len,
                tokens=list(request.tokens),
                block_table=list(request.blocks),
            )
        )

    def arrive(self, request: Request) -> None:
        """A request whose tokens' KV is in its blocks already."""
        request.state = State.KV_HERE
        self.kv_here.append(request)

    def remove(self, request: Request) -> None:
        """Take the request out of whichever set it is in. Its blocks stay its own."""
        if request.state is State.RUNNING:
            self.leave(request)
        elif request.state is State.WAITING:
            self.waiting.remove(request)
        else:
            self.kv_here.remove(request)

    def leave(self, request: Request) -> None:
        """Out of the running set; the slot is free for the next step."""
        self.running.remove(request)
        self._free_slots.append(request.slot)
        request.slot = -1

    def completed(self, result: StepResult) -> list[Planned]:
        """What the oldest step in flight was planned to do, now that its result is here."""
        step = self._in_flight.popleft()
        if step.plan.step != result.step:
            raise AssertionError(f"result of step {result.step} arrived while step {step.plan.step} was the oldest")
        self._pool.step_completed(result.step)
        self._pool.release(step.copied, self._step if self._in_flight else 0)
        self._measure(step, result)
        return step.planned

    def _measure(self, step: InFlight, result: StepResult) -> None:
        # A step that was enqueued early began when the one before it ended.
        elapsed = result.sampled_s - max(result.started_s, self._last_sampled_s)
        self._last_sampled_s = result.sampled_s
        self._device.step_ended(result.sampled_s)
        tokens = sum(item.end - item.start for item in step.planned if not item.decodes)
        if tokens and elapsed > 0:
            self.tokens_per_s = tokens / elapsed
        if self._costs is not None and step.has_prompts and elapsed > 0:
            self._costs.learn(step.expected_s, elapsed)
        still_s = sum(other.expected_s for other in self._in_flight)
        self._lead.ended(result.started_s, result.sampled_s, step.follows, still_s)

    def fence(self, request: Request) -> int:
        """The last step in flight that may still write the request's blocks; 0 when none is."""
        first_in_flight = self._step - len(self._in_flight) + 1
        return request.last_step if request.last_step >= first_in_flight else 0


def _decodes(request: Request) -> bool:
    """Whether its next row is one token, drawn or about to be."""
    return request.total - request.scheduled == 1 and not request.ends_with_prefill
