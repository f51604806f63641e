"""A worker process: the real batcher between simulated sockets, a simulated device and a simulated transport.

It follows worker/session.py; steps and copies take virtual time and touch the pool when a real device would.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from baton.kv_transfer.contract import Pull, PullDone
from baton.proto import PROTOCOL_VERSION
from baton.proto.channels import identity
from baton.proto.config import BatchConfig, CacheConfig, LeaseConfig
from baton.proto.layout import Group, KVLayout
from baton.proto.lifecycle import Duty
from baton.proto.messages import (
    Beat,
    CancelCommand,
    CancelStream,
    Configure,
    Fenced,
    Goodbye,
    Join,
    Message,
    NotAdmitted,
    Peer,
    Prompts,
    Settings,
    Share,
    StartDecode,
    StartPrefill,
    Swapped,
    TokenBatch,
    Turn,
    Welcome,
    WhoAreYou,
    WorkerHello,
)
from baton.worker.batcher import Batcher
from baton.worker.effects import Compile, Compiled, Emit, ToHolder, ToKeeper, ToOwner, ToScheduler
from baton.worker.plan import StepPlan
from baton.worker.step_costs import StepCosts

from .keeper import KeeperProcess, Link
from .model import Memory, Runner
from .network import Network
from .world import Process, World

BEAT_INTERVAL_S = 0.5
LOAD_INTERVAL_S = 0.05
HOLDINGS_INTERVAL_S = 0.5
HELLO_INTERVAL_S = 1.0
COMPILE_S = 0.05
"""Mean, of a grammar."""


@dataclass(frozen=True)
class WorkerSpec:
    """One worker's configuration."""

    name: str
    role: str
    num_blocks: int
    cache: CacheConfig
    batch: BatchConfig
    lease: LeaseConfig
    early_bind_tokens: int
    max_model_len: int
    step_s: float
    """Mean duration of a step."""
    copy_s: float
    """Mean duration of a pull."""
    noisy: bool
    """Whether samples depend on who draws them."""
    knows_costs: bool = False
    """Whether steps are planned by what they should take, about as long as they do."""

    def costs(self) -> StepCosts | None:
        """For one incarnation."""
        table = [(16, 0.8 * self.step_s), (256, 1.6 * self.step_s)]
        return StepCosts(table, per_key=0.0, per_pair=0.0, padded_to=256) if self.knows_costs else None

    @property
    def layout(self) -> KVLayout:
        """Equal for all workers of a simulation."""
        group = Group("full", 1, self.cache.block_size, 8 * self.cache.block_size, ("tokens",), (1,), "int64")
        return KVLayout("simulated", (group,))


class Worker(Process):
    """One worker over all its lives and incarnations."""

    def __init__(
        self,
        world: World,
        network: Network,
        spec: WorkerSpec,
        memories: dict[str, Memory],
        keeper: KeeperProcess | None = None,
    ) -> None:
        super().__init__(world, spec.name)
        self.spec = spec
        self.network = network
        self._memories = memories
        """By kv_endpoint: what peers have mapped. It outlives the process that made it."""
        self._keeper = keeper
        self._link: Link | None = None
        self.batcher: Batcher | None = None

    def start(self) -> None:
        """A new process with an empty pool, or with its share of the keeper's."""
        self.alive = True
        self._pulls = 0
        self._device_free_at = self._result_at = self.world.now
        if self._keeper is None:
            self.memory = Memory(self.spec.num_blocks, self.spec.cache.block_size)
            self._join()
        else:
            self.memory = self._keeper.memory
            self._link = self._keeper.connect(self, self._on_keeper)

    def kill(self) -> None:
        """Peers keep what they have mapped."""
        super().kill()
        self.network.unbind(self)
        self.batcher = None
        if self._link is not None:
            self._link.cut()

    def _on_keeper(self, message: Message, frames: tuple[bytes, ...]) -> None:
        match message:
            case Turn():
                self._join()
            case Share():
                self._begin(np.frombuffer(frames[0], dtype=np.int32).tolist())
            case Swapped() | Prompts():
                self._on_lease(b"keeper", message, ())

    def _join(self) -> None:
        """A new incarnation, once it is known which blocks it has."""
        self.incarnation = self.world.rng.getrandbits(48)
        if self._link is None:
            self._begin(range(self.spec.num_blocks))
        else:
            self._link.send(Join(self.incarnation))

    def _begin(self, blocks: Sequence[int]) -> None:
        """Over the memory that is there."""
        spec = self.spec
        pool = "shared" if self._keeper is not None else ""
        self.me = Peer(
            spec.name, self.incarnation, f"peer:{spec.name}:{self.incarnation}", f"kv:{self.incarnation}", pool
        )
        self._memories[self.me.kv_endpoint] = self.memory
        self.batcher = Batcher(
            self.me,
            blocks,
            spec.max_model_len,
            spec.cache,
            spec.batch,
            spec.lease,
            spec.early_bind_tokens,
            spec.costs(),
            shares_device=self._keeper is not None,
        )
        self._runner = Runner(self.memory, noise=self.incarnation if spec.noisy else 0)
        self._device_free_at = self._result_at = self.world.now
        self._fenced = False
        self._settings = Settings(role=spec.role)
        self._welcome = False
        self._hello_at = self._load_at = self._holdings_at = self._beat_at = float("-inf")
        self._load_due = False
        self._seq: dict[str, int] = {}
        self._token_sent_at: dict[str, float] = {}
        self._identity = identity(spec.name, self.incarnation)
        self.network.bind(self, self._identity.decode(), self._on_control)
        self.network.bind(self, self.me.endpoint, self._on_lease)
        self.network.bind(self, f"holder:{self._identity.decode()}", self._on_lease)
        self.network.bind(self, f"tokens:{self._identity.decode()}", self._on_cancel)
        self.turn()

    def _on_fenced(self) -> None:
        """What is on the device or in the transport ends first; then a new incarnation has the same memory."""
        self._fenced = True
        self.network.unbind(self)
        self.batcher = None
        self._begin_when_still()

    def _begin_when_still(self) -> None:
        if self._pulls == 0 and self._device_free_at <= self.world.now:
            self._join()
        else:
            self.later(0.01, self._begin_when_still)

    @property
    def copying(self) -> bool:
        """Whether a pull is running."""
        return self._pulls > 0

    def say_goodbye(self) -> None:
        """Leave in order."""
        self._to_scheduler(Goodbye(self.name, self.incarnation))

    def turn(self) -> None:
        """One iteration of the session's loop."""
        batcher, now = self.batcher, self.world.now
        if batcher is None or self.draining:
            return
        if batcher.next_deadline() <= now:
            batcher.tick(now)
        while (plan := batcher.schedule(now)) is not None:
            self._submit(plan)
            self._load_due = True
        self._carry_out(batcher)
        self._report(batcher)
        self.wake(self._next_turn(batcher))

    def _next_turn(self, batcher: Batcher) -> float:
        token_beats = min(self._token_sent_at.values(), default=float("inf")) + BEAT_INTERVAL_S
        at = min(batcher.next_deadline(), token_beats, self._beat_at + BEAT_INTERVAL_S)
        if not self._welcome:
            return min(at, self._hello_at + HELLO_INTERVAL_S)
        at = min(at, self._holdings_at + HOLDINGS_INTERVAL_S)
        return min(at, self._load_at + LOAD_INTERVAL_S) if self._load_due else at

    def _report(self, batcher: Batcher) -> None:
        now = self.world.now
        if now - self._beat_at >= BEAT_INTERVAL_S:
            self._beat_at = now
            beat = Beat(self.name, self.incarnation)
            self.network.send(self, "scheduler", self._identity + b":beat", beat, dealer=True)
        if not self._welcome:
            if now - self._hello_at >= HELLO_INTERVAL_S:
                self._hello(batcher)
            return
        with_holdings = now - self._holdings_at >= HOLDINGS_INTERVAL_S
        if with_holdings or (self._load_due and now - self._load_at >= LOAD_INTERVAL_S):
            load = batcher.load(with_holdings)
            self._to_scheduler(msgspec.structs.replace(load, settings=self._settings if with_holdings else None))
            self._load_at, self._load_due = now, False
            if with_holdings:
                self._holdings_at = now

    def _hello(self, batcher: Batcher) -> None:
        self._hello_at = self.world.now
        spec = self.spec
        hello = WorkerHello(
            worker=spec.name,
            incarnation=self.incarnation,
            role=spec.role,
            pid=self.life + 1,
            protocol=PROTOCOL_VERSION,
            peer=self.me,
            layout=spec.layout,
            num_blocks=spec.num_blocks,
            block_size=spec.cache.block_size,
            max_model_len=spec.max_model_len,
            max_num_seqs=spec.batch.max_num_seqs,
            max_num_batched_tokens=spec.batch.max_num_batched_tokens,
            holdings=batcher.holdings(),
            settings=self._settings,
            epoch=batcher.epoch,
        )
        self._to_scheduler(hello)
        batcher.resend_ready()
        self._carry_out(batcher)

    def _carry_out(self, batcher: Batcher) -> None:
        rows: dict[str, list[Emit]] = {}
        effects, batcher.outbox[:] = list(batcher.outbox), []
        for effect in effects:
            match effect:
                case Emit():
                    rows.setdefault(effect.reply_to, []).append(effect)
                case ToScheduler():
                    self._to_scheduler(effect.message)
                case ToOwner():
                    sender = f"holder:{self._identity.decode()}".encode()
                    self.network.send(self, effect.owner.endpoint, sender, effect.message, dealer=True)
                case ToHolder():
                    holder = identity(effect.holder.worker, effect.holder.incarnation).decode()
                    self.network.send(self, f"holder:{holder}", self.me.endpoint.encode(), effect.message)
                case ToKeeper():
                    assert self._link is not None
                    self._link.send(effect.message)
                case Pull():
                    self._pull(effect)
                case Compile():
                    self._compile(effect.grammar)
        for endpoint, group in rows.items():
            self._seq[endpoint] = self._seq.get(endpoint, 0) + 1
            frames = [row.prompt_logprobs.data for row in group if row.prompt_logprobs]
            if vectors := b"".join(row.vector for row in group):
                frames.append(vectors)
            self._send_tokens(endpoint, _token_batch(self.me, self._seq[endpoint], group), tuple(frames))
        for endpoint, sent_at in self._token_sent_at.items():
            if self.world.now - sent_at >= BEAT_INTERVAL_S:
                frontend = int(endpoint.rpartition(":")[2])
                beat = TokenBatch(self.name, self.incarnation, self._seq[endpoint], frontend=frontend)
                self._send_tokens(endpoint, beat)

    def _send_tokens(self, endpoint: str, batch: TokenBatch, frames: tuple[bytes, ...] = ()) -> None:
        self._token_sent_at[endpoint] = self.world.now
        self.network.send(self, endpoint, f"tokens:{self._identity.decode()}".encode(), batch, frames, dealer=True)

    def _to_scheduler(self, message: Message) -> None:
        self.network.send(self, "scheduler", self._identity, message, dealer=True)

    def _submit(self, plan: StepPlan) -> None:
        """The device goes on while the process is paused, its results wait; and for a moment after its end."""
        incarnation, life, runner, link = self.incarnation, self.life, self._runner, self._link
        started = max(self.world.now, self._device_free_at)
        ended = started + self.world.rng.uniform(0.2, 1.8) * self.spec.step_s
        self._device_free_at = ended
        results: deque = deque()

        def execute() -> None:
            if self.life == life or (link is not None and self.world.now < link.gone_at):
                results.append(runner.execute(plan, started, ended))

        def deliver() -> None:
            if self.incarnation == incarnation and self.batcher is not None:
                self.batcher.complete(results.pop(), self.world.now)
                self._load_due = True
                self.turn()

        self.world.at(ended, execute)
        # The host hears of a result a little later, and in order.
        self._result_at = max(self._result_at, ended + self.world.rng.expovariate(1 / (0.3 * self.spec.step_s)))
        self.later(self._result_at - self.world.now, deliver)

    def _compile(self, grammar: str) -> None:
        """A thread of the process does it, whichever incarnation hears of it."""

        def done() -> None:
            if self.batcher is not None:
                self.batcher.handle(Compiled(grammar), (), self.world.now)
                self.turn()

        self.later(self.world.rng.expovariate(1 / COMPILE_S), done)

    def _pull(self, pull: Pull) -> None:
        """Half of the blocks are read early, the others late: a real copy is not one instant either."""
        rng, life, incarnation = self.world.rng, self.life, self.incarnation
        source = self._memories[pull.owner.kv_endpoint]
        moments = sorted(rng.expovariate(1 / self.spec.copy_s) for _ in range(3))
        ok = rng.random() >= 0.01
        pairs = list(zip(pull.source.tolist(), pull.target.tolist(), strict=True))
        half = len(pairs) // 2
        self._pulls += 1

        def copy(part: list[tuple[int, int]]) -> None:
            if self.life == life:
                for theirs, ours in part:
                    self.memory.blocks[ours][:] = source.blocks[theirs]

        def done() -> None:
            self._pulls -= 1
            if self.incarnation == incarnation and self.batcher is not None:
                num_bytes = 8 * self.spec.cache.block_size * len(pairs)
                reason = "" if ok else "simulated"
                self.batcher.handle(PullDone(pull.transfer, ok, reason, "simulated", num_bytes), (), self.world.now)
                self.turn()

        self.world.at(self.world.now + moments[0], lambda: copy(pairs[:half]))
        self.world.at(self.world.now + moments[1], lambda: copy(pairs[half:] if ok else []))
        self.later(moments[2], done)

    def _on_control(self, _sender: bytes, message: Message, frames: tuple[bytes, ...]) -> None:
        batcher = self.batcher
        if batcher is None:
            return
        match message:
            case Welcome():
                self._welcome = True
                batcher.handle(message, (), self.world.now)
            case WhoAreYou():
                self._hello(batcher)
            case Configure() if message.epoch < batcher.epoch:
                return
            case Configure():
                before, self._settings = self._settings, message.settings
                if before.cache_flushes != message.settings.cache_flushes:
                    batcher.pool.clear_cache()
                if message.settings.duty == Duty.LEAVING:
                    self.say_goodbye()
                    self.kill()
                    return
                self._holdings_at = float("-inf")
            case NotAdmitted():
                assert not message.final, message.reason
            case Fenced():
                if message.incarnation == self.incarnation:
                    self._on_fenced()
                return
            case _:
                if isinstance(message, StartPrefill | StartDecode | CancelCommand) and message.epoch < batcher.epoch:
                    self._hello(batcher)
                batcher.handle(message, frames, self.world.now)
                self._load_due = True
        self.turn()

    def _on_lease(self, _sender: bytes, message: Message, _frames: tuple[bytes, ...]) -> None:
        if self.batcher is not None:
            self.batcher.handle(message, (), self.world.now)
            self._load_due = True
            self.turn()

    def _on_cancel(self, _sender: bytes, message: Message, _frames: tuple[bytes, ...]) -> None:
        assert isinstance(message, CancelStream)
        self._on_lease(_sender, message, _frames)


def _token_batch(me: Peer, seq: int, rows: list[Emit]) -> TokenBatch:
    return TokenBatch(
        worker=me.worker,
        incarnation=me.incarnation,
        seq=seq,
        n=tuple(row.sid[1] for row in rows),
        attempt=tuple(row.attempt for row in rows),
        pos=tuple(row.pos for row in rows),
        count=tuple(len(row.tokens) for row in rows),
        tokens=tuple(token for row in rows for token in row.tokens),
        finish={i: row.finish for i, row in enumerate(rows) if row.finish is not None},
        ledgers={i: row.ledger for i, row in enumerate(rows) if row.ledger is not None},
        prompt_logprobs={i: row.prompt_logprobs.top for i, row in enumerate(rows) if row.prompt_logprobs},
        vectors=tuple(i for i, row in enumerate(rows) if row.vector),
        frontend=rows[0].sid[0],
    )
