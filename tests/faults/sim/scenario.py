"""One random history of a cluster, wholly determined by its seed: who is there, what is asked, what goes wrong."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from random import Random

from baton.frontend.streams import Limits
from baton.proto.config import BatchConfig, CacheConfig, LeaseConfig, PlacementConfig, SchedulerConfig
from baton.proto.lifecycle import Outcome, Pooling
from baton.proto.messages import SamplingParams, Sid

from .audit import audit_blocks, audit_end, audit_keeper, audit_shares, held_until, leftovers, scheduler_leftovers
from .faults import FAULTS_UNTIL_S, Faults
from .frontend import Call, Frontend
from .keeper import KeeperProcess
from .model import NOISE, OUTCOMES, STOP_TOKENS, Memory, Reference, reference_vector
from .network import Network
from .scheduler import Scheduler
from .worker import Worker, WorkerSpec
from .world import Process, World

BLOCK_SIZE = 16
QUIET_WITHIN_S = 24.0
QUIET_WITHIN_COPIES = 40
"""Once faults have stopped, everything ends and is freed within this time and so many durations of a pull."""
GIVEN_UP_WITHIN_S = 6.0 + Limits().busy_s
"""What nobody who is left can hold ends so much later: the scheduler waits for a return, then the frontend."""
ROLES = {"p": "prefill", "d": "decode", "u": "unified"}
TOPOLOGIES = ("pd", "pd", "ppdd", "pdd", "ppd", "u", "uu", "pdu")
LENGTHS = ((9,), (9,), (4, 9), (5, 7, 9))
"""Blocks that the longest sequences of workers take; not more than 9 are asked for, but at an edge."""
AT_AN_EDGE = 0.1
"""Share of prompts that a worker just holds, or just not."""
PROBES = 3
"""Requests asked one by one when all is quiet."""
POOLED = 0.2
"""Share of requests that want a vector instead of tokens."""


@dataclass
class Report:
    """What came of it."""

    outcomes: Counter[str] = field(default_factory=Counter)
    retries: int = 0
    """Attempts beyond each request's first."""
    vectors: int = 0
    """Requests that got the vector that they wanted."""
    quiet_after_s: float = 0.0
    """From the end of the faults."""


class Scenario:
    """Draws a cluster, its requests and its faults from the seed."""

    def __init__(self, seed: int, depth: int, shared: bool = False, trace: Callable[[str], None] | None = None) -> None:
        """`shared`: all workers have their blocks in the one pool of a keeper, and no prefix cache."""
        self.world = World(seed, trace)
        self.rng = self.world.rng
        self.network = Network(self.world)
        letters = self.rng.choice(TOPOLOGIES)
        config = SchedulerConfig(
            endpoint="scheduler",
            expected_workers=self.rng.choice((0, len(letters))),
            placement=PlacementConfig(self.rng.choice(("least_loaded", "round_robin"))),
            heartbeat_timeout_s=2.0,
            grace_s=1.0,
            reconcile_after_s=1.0,
            no_workers_s=5.0,
            max_waiting=self.rng.choice((3, 100)),
        )
        self.scheduler = Scheduler(self.world, self.network, config)
        memories: dict[str, Memory] = {}
        specs = self._draw_workers(letters, depth, shared)
        self.keeper = self._draw_keeper(specs) if shared else None
        self.workers = [Worker(self.world, self.network, spec, memories, self.keeper) for spec in specs]
        self.frontends = [Frontend(self.world, self.network, f"frontend-{i}") for i in range(self.rng.choice((1, 2)))]
        self.processes: list[Process] = [self.scheduler, *self.workers, *self.frontends]
        self._prefixes = [_draw_tokens(self.rng, 48) for _ in range(2)]
        self.faults = Faults(self.world, self.network, self.scheduler, self.workers, self.processes)

    def run(self) -> Report:
        """Raises AssertionError on anything that must not be."""
        for process in self.rng.sample(self.processes, len(self.processes)):
            self.world.at(self.rng.uniform(0.0, 0.3), process.start)
        self._plan_requests()
        self.faults.plan()
        while self.world.now < FAULTS_UNTIL_S:
            self.world.run(self.world.now + 0.25)
            self._audit()
        self.faults.end()
        self._until_quiet()
        report = self._report()
        for _ in range(PROBES):
            self._probe()
        if self.keeper is not None and self.keeper.state.shares is not None:
            audit_keeper([worker.batcher for worker in self.workers if worker.batcher], self.keeper.state.shares)
        return report

    def _until_quiet(self) -> None:
        patience_s = QUIET_WITHIN_S + QUIET_WITHIN_COPIES * max(worker.spec.copy_s for worker in self.workers)
        patience_s += GIVEN_UP_WITHIN_S if self.faults.gone else 0.0
        deadline = self.world.now + patience_s
        while left := self._leftovers():
            assert self.world.now < deadline, f"not quiet after {patience_s:.0f} s: {left}"
            self.world.run(self.world.now + 0.25)
            self._audit()

    @property
    def _left(self) -> list[WorkerSpec]:
        """Workers that are there, or will be again."""
        return [worker.spec for worker in self.workers if worker not in self.faults.gone]

    @property
    def _complete(self) -> bool:
        """Whether all workers have been there once, as far as the scheduler knows."""
        return self.scheduler.cluster is not None and self.scheduler.cluster.registry.complete_once

    def _probe(self) -> None:
        """Without faults what comes of a request follows from who is left."""
        call = self._draw_call()
        call.timeout_s = 0.0
        held = held_until(self._left, call, self._complete)
        self.frontends[0].submit(call)
        self._until_quiet()
        if held:
            assert call.outcome in (Outcome.STOP, Outcome.LENGTH), f"{call.outcome} instead of an end: {call.message}"
            whole = len(call.prompt) + call.params.max_tokens
            assert call.complete or whole > held, f"cut off at {call.num_tokens}, and somebody holds {held}"
        else:
            assert call.outcome is Outcome.REJECTED, f"{call.outcome}, and nobody can hold it: {call.message}"
        audit_end(call, self._left, self._complete)

    def _draw_workers(self, letters: str, depth: int, shared: bool) -> list[WorkerSpec]:
        rng = self.rng
        cache = CacheConfig(block_size=BLOCK_SIZE, enable_prefix_caching=rng.random() < 0.7 and not shared)
        lease = LeaseConfig(unbound_s=3.0, holder_s=1.5, renew_interval_s=0.3, remember_s=10.0)
        batch = BatchConfig(
            max_num_batched_tokens=rng.choice((16, 48, 256)),
            max_num_seqs=rng.choice((2, 4, 16)),
            target_itl_ms=10.0,
            prompts_first=rng.random() < 0.2,
            depth=depth,
        )
        early_bind_tokens = rng.choice((32, 1000))
        copy_s = rng.choice((0.0005, 0.01, 0.1, 1.0))
        lengths = rng.choice(LENGTHS)
        noisy, knows_costs = rng.random() < 0.3, rng.random() < 0.3
        longest = [rng.choice(lengths) for _ in letters]
        return [
            WorkerSpec(
                name=f"{ROLES[letter]}-{index}",
                role=ROLES[letter],
                num_blocks=longest[index] + rng.choice((0, 3, 31)),
                cache=cache,
                batch=batch,
                lease=lease,
                early_bind_tokens=early_bind_tokens,
                max_model_len=longest[index] * BLOCK_SIZE - rng.choice((0, 0, 5)),
                step_s=rng.choice((0.002, 0.01, 0.03)),
                copy_s=copy_s,
                noisy=noisy,
                knows_costs=knows_costs,
            )
            for index, letter in enumerate(letters)
        ]

    def _draw_keeper(self, specs: list[WorkerSpec]) -> KeeperProcess:
        slowness = self.rng.choice((1.0, 1.0, 10.0))
        blocks = {spec.name: spec.num_blocks for spec in specs}
        return KeeperProcess(self.world, blocks, BLOCK_SIZE, lambda: slowness * self.network.conditions.delay_s)

    def _draw_call(self) -> Call:
        rng = self.rng
        prompt = rng.choice(self._prefixes)[: rng.choice((0, 16, 33, 48))] + _draw_tokens(rng, rng.randint(1, 50))
        if rng.random() < AT_AN_EDGE:
            length = rng.choice(self.workers).spec.max_model_len - rng.randint(0, 2)
            prompt = (prompt + _draw_tokens(rng, length))[:length]
        contexts = frozenset(worker.spec.max_model_len for worker in self.workers)
        timeout_s = rng.choice((0.0, 0.0, 0.0, 3.0))
        priority = rng.choice((0, 0, 0, 0, -1, 1))
        if rng.random() < POOLED:
            params = SamplingParams(max_tokens=0, pooling=rng.choice(list(Pooling)).value)
            vector = reference_vector(prompt, params.pooling, BLOCK_SIZE)
            return Call(prompt, params, Reference(prompt, 0, BLOCK_SIZE), timeout_s, vector, priority, contexts)
        params = SamplingParams(
            max_tokens=rng.choice((1, 2, 8, 24, 40)),
            stop_token_ids=STOP_TOKENS if rng.random() < 0.5 else (),
            prompt_logprobs=0 if rng.random() < 0.15 else -1,
            grammar=rng.choice(("anything", "anything at all")) if rng.random() < 0.15 else "",
        )
        reference = Reference(prompt, params.max_tokens, BLOCK_SIZE)
        return Call(prompt, params, reference, timeout_s, b"", priority, contexts)

    def _sample_of(self, call: Call) -> Call:
        """One of several samples; without noise they are equal."""
        reference = Reference(call.prompt, call.params.max_tokens, BLOCK_SIZE)
        return Call(call.prompt, call.params, reference, call.timeout_s, call.vector, call.priority, call.contexts)

    def _plan_requests(self) -> None:
        aborts = self.rng.choice((0.0, 0.0, 0.3))
        burst = self.rng.random() < 0.3
        for _ in range(self.rng.randint(3, 14)):
            at = 0.5 if burst else self.rng.uniform(0.2, FAULTS_UNTIL_S)
            self.world.at(at, lambda: self._ask(self.rng.random() < aborts))

    def _ask(self, will_abort: bool) -> None:
        frontend, call = self.rng.choice(self.frontends), self._draw_call()
        first: Sid | None = None
        for _ in range(self.rng.choice((1, 1, 1, 2, 4))):
            sid = frontend.submit(self._sample_of(call), first)
            first = first or sid
            if sid is not None and will_abort:
                frontend.later(self.rng.expovariate(1 / 0.2), partial(frontend.abort, sid))

    def _audit(self) -> None:
        batchers = [worker.batcher for worker in self.workers if worker.batcher is not None]
        for batcher in batchers:
            audit_blocks(batcher)
        if self.keeper is not None:
            audit_shares(batchers)

    def _leftovers(self) -> list[str]:
        left = [self._worker_leftovers(worker) for worker in self.workers]
        left.append(scheduler_leftovers(self.scheduler.cluster) if self.scheduler.cluster else "scheduler is down")
        if self.scheduler.life and not self._complete:
            left.append("scheduler waits for others to come back")
        for frontend in self.frontends:
            streams = frontend.streams
            if streams is None or len(streams) or streams.closing:
                left.append(f"{frontend.name}: {streams.open_sids() if streams else 'down'}")
        return [text for text in left if text]

    def _worker_leftovers(self, worker: Worker) -> str:
        member = self.scheduler.cluster.registry.worker_named(worker.name) if self.scheduler.cluster else None
        if worker in self.faults.gone:
            return f"{worker.name} has not gone" if worker.alive or member is not None else ""
        if worker.batcher is None:
            return f"{worker.name} is down"
        if member is None or member.hello.incarnation != worker.incarnation:
            return f"{worker.name} is not a member"
        if not member.active or member.role != worker.spec.role:
            return f"{worker.name} is not what it was"
        return leftovers(worker.batcher)

    def _report(self) -> Report:
        report = Report(quiet_after_s=self.world.now - FAULTS_UNTIL_S)
        for frontend in self.frontends:
            for call in frontend.calls:
                assert call.orphaned or call.outcome is not None, f"never ended: {call}"
                report.outcomes["orphaned" if call.outcome is None else call.outcome.value] += 1
                report.retries += call.attempts - 1
                report.vectors += call.outcome is Outcome.STOP and bool(call.vector)
                audit_end(call, self._left, self._complete)
        return report


def _draw_tokens(rng: Random, count: int) -> list[int]:
    return [rng.randrange(NOISE, NOISE * OUTCOMES) for _ in range(count)]
