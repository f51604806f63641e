"""Who is in the cluster: workers with their load and what was promised to them, frontends, and those who left."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from baton.proto.address import crosses_hosts
from baton.proto.lifecycle import Duty, Role
from baton.proto.messages import FrontendHello, KVLink, Load, Settings, Sid, WorkerHello, WorkerStatus

PREFILL_BACKLOG_STEPS = 4
"""Steps' worth of prompt tokens that a worker may have before it: enough to stay busy, few enough to place late."""
GONE_MEMORY = 1024
"""Incarnations remembered after they left, so that a late message of theirs is fenced."""


@dataclass(slots=True, frozen=True)
class Promise:
    """What a command will cost its worker, until a Load that has seen the command says it better."""

    streams: int
    tokens: int
    """To be computed."""
    blocks: int


class Promises:
    """Those of one worker by cmd_seq, ascending, with their sums: every message asks for these."""

    def __init__(self) -> None:
        self._open: dict[int, Promise] = {}
        self.streams = self.tokens = self.blocks = 0

    def __len__(self) -> int:
        return len(self._open)

    def add(self, cmd_seq: int, promise: Promise) -> None:
        """A command was sent; higher cmd_seq than any before."""
        self._open[cmd_seq] = promise
        self._count(promise, 1)

    def drop(self, cmd_seq: int) -> None:
        """What it asked for is over, or will not be."""
        promise = self._open.pop(cmd_seq, None)
        if promise is not None:
            self._count(promise, -1)

    def settle(self, last_cmd_seq: int) -> None:
        """A report has seen all commands up to this one."""
        while self._open and (oldest := next(iter(self._open))) <= last_cmd_seq:
            self.drop(oldest)

    def _count(self, promise: Promise, sign: int) -> None:
        self.streams += sign * promise.streams
        self.tokens += sign * promise.tokens
        self.blocks += sign * promise.blocks


@dataclass(slots=True, eq=False)
class Worker:
    """One incarnation of one worker."""

    identity: bytes
    hello: WorkerHello
    joined_at: float
    heard_at: float
    load: Load | None = None
    promises: Promises = field(default_factory=Promises)
    streams: dict[Sid, None] = field(default_factory=dict)
    """With a leg here."""
    holdings: dict[tuple[Sid, int], str] = field(default_factory=dict)
    """(sid, attempt) -> leg, as last reported."""
    links: tuple[KVLink, ...] = ()
    """How it reads the KV of others, as last reported."""
    settings: Settings = field(default_factory=Settings)
    """What it should be; orders.py sees to it."""
    obeys: bool = True
    """Its last word on its settings was that they are these."""

    @property
    def name(self) -> str:
        """As in Hello."""
        return self.hello.worker

    @property
    def role(self) -> str:
        """A Role."""
        return self.settings.role or self.hello.role

    @property
    def active(self) -> bool:
        """Whether it gets new streams."""
        return self.settings.duty == Duty.ACTIVE

    @property
    def idle(self) -> bool:
        """Whether it has no streams, nor KV that somebody may still read."""
        leases = self.load.leases if self.load else 0
        return not (self.streams or self.holdings or self.num_streams or leases)

    @property
    def drained(self) -> bool:
        """Whether it is idle, and will be."""
        return not self.active and self.idle

    @property
    def prefills(self) -> bool:
        """Whether prefill legs may be sent here."""
        return self.active and self.role in (Role.PREFILL, Role.UNIFIED)

    @property
    def decodes(self) -> bool:
        """Whether decode legs may be sent here."""
        return self.active and self.role in (Role.DECODE, Role.UNIFIED)

    @property
    def outstanding_tokens(self) -> int:
        """Prompt tokens not yet computed, reported and promised."""
        reported = self.load.queued_tokens if self.load else 0
        return reported + self.promises.tokens

    @property
    def free_blocks(self) -> int:
        """Reported less promised; negative when more was promised than there is."""
        reported = self.load.free_blocks if self.load else self.hello.num_blocks
        return reported - self.promises.blocks

    @property
    def num_streams(self) -> int:
        """Running, waiting and promised."""
        reported = self.load.running + self.load.waiting if self.load else 0
        return reported + self.promises.streams

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens here."""
        return -(-num_tokens // self.hello.block_size)

    def fits(self, needed: int) -> bool:
        """Whether a stream that needs room for so many tokens can ever run here."""
        return needed <= self.longest

    @property
    def longest(self) -> int:
        """Tokens of the longest stream that can run here."""
        return min(self.hello.max_model_len, self.hello.num_blocks * self.hello.block_size)

    @property
    def shares_prompts(self) -> bool:
        """Whether streams that begin alike have one copy of it here; not where blocks are swapped: each has its own."""
        return not self.hello.peer.shared_pool

    def has_prefill_room(self, num_tokens: int) -> bool:
        """Whether to send a prompt now rather than keep it queued, where another worker may yet take it."""
        backlog = self.outstanding_tokens
        return backlog == 0 or backlog + num_tokens <= PREFILL_BACKLOG_STEPS * self.hello.max_num_batched_tokens

    def take_load(self, load: Load) -> None:
        """Believe a report; promises that it has seen are part of it."""
        self.load = load
        self.links = self.links if load.links is None else load.links
        self.promises.settle(load.last_cmd_seq)

    def status(self) -> WorkerStatus:
        """For ClusterStatus."""
        running, waiting = (self.load.running, self.load.waiting) if self.load else (0, 0)
        hello = self.hello
        return WorkerStatus(
            hello.worker, hello.incarnation, self.role, hello.num_blocks, max(self.free_blocks, 0), running, waiting
        )


@dataclass(slots=True, eq=False)
class Frontend:
    """One incarnation of one frontend."""

    identity: bytes
    hello: FrontendHello
    heard_at: float
    log_level: str = ""
    """What an operator has said; empty: nothing."""


class Registry:
    """Members by identity, in the order in which they joined."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        """Of what workers are sent: this start of the scheduler, or higher where one of them has obeyed a higher one,
        as after a clock was set back."""
        self.complete_once = False
        """All expected workers have been there, or had time to since a restart of the scheduler: from then on others
        stand in for a role that nobody is left for."""
        self.workers: dict[bytes, Worker] = {}
        self.frontends: dict[bytes, Frontend] = {}
        self._gone: dict[bytes, str] = {}
        self._mismatches: dict[tuple[bytes, bytes], str | None] = {}
        # Derived from the membership, forgotten when it changes.
        self._prefill_workers: list[Worker] | None = None
        self._decode_workers: dict[bytes, list[Worker]] = {}

    def member(self, identity: bytes) -> Worker | Frontend | None:
        """Who speaks under this identity."""
        return self.workers.get(identity) or self.frontends.get(identity)

    def members(self) -> list[Worker | Frontend]:
        """Everybody."""
        return [*self.workers.values(), *self.frontends.values()]

    def add(self, member: Worker | Frontend) -> None:
        """A member has said hello."""
        self.forget_derived()
        if isinstance(member, Worker):
            self.workers[member.identity] = member
        else:
            self.frontends[member.identity] = member

    def remove(self, member: Worker | Frontend) -> None:
        """A member has left."""
        self.workers.pop(member.identity, None)
        self.frontends.pop(member.identity, None)
        self.forget_derived()
        self._mismatches = {pair: why for pair, why in self._mismatches.items() if member.identity not in pair}

    def remember_gone(self, identity: bytes, fence_reason: str) -> None:
        """Answer late messages of a removed worker with Fenced, or with silence when the reason is empty."""
        self._gone[identity] = fence_reason
        if len(self._gone) > GONE_MEMORY:
            del self._gone[next(iter(self._gone))]

    def fence_reason(self, identity: bytes) -> str | None:
        """Why this incarnation is out; None when it is not."""
        return self._gone.get(identity)

    def worker_named(self, name: str) -> Worker | None:
        """The registered incarnation of a worker."""
        return next((worker for worker in self.workers.values() if worker.name == name), None)

    def frontend_named(self, name: str) -> Frontend | None:
        """The registered incarnation of a frontend."""
        return next((frontend for frontend in self.frontends.values() if frontend.hello.name == name), None)

    def mismatches_of(self, worker: Worker) -> Iterator[tuple[Worker, str]]:
        """Workers that can't exchange blocks with this one although their roles would, and why."""
        for other in self.workers.values():
            if other is worker or not ((worker.prefills and other.decodes) or (worker.decodes and other.prefills)):
                continue
            why = self.mismatch(worker, other)
            if why is not None:
                yield other, why

    def mismatch(self, one: Worker, other: Worker) -> str | None:
        """Why blocks can't cross between two workers, or None. Compared once per pair."""
        pair = (one.identity, other.identity)
        if pair not in self._mismatches:
            self._mismatches[pair] = _separated(one, other) or one.hello.layout.mismatch(other.hello.layout)
        return self._mismatches[pair]

    def prefill_workers(self, ends_there: bool = False) -> list[Worker]:
        """Workers from which a stream can go all the way; `ends_there`: the prefill is all of it."""
        if not self.lacks_role(ends_there):
            return [w for w in self.workers.values() if w.prefills] if ends_there else self._complete_paths()
        return self.stand_ins()

    def lacks_role(self, ends_there: bool = False) -> bool:
        """Whether nobody is there for something that a stream needs; others may stand in."""
        return not (any(w.prefills for w in self.workers.values()) if ends_there else self._complete_paths())

    def _complete_paths(self) -> list[Worker]:
        if self._prefill_workers is None:
            workers = self.workers.values()
            self._prefill_workers = [w for w in workers if w.prefills and (w.decodes or self.decode_workers(w))]
        return self._prefill_workers

    def stand_ins(self) -> list[Worker]:
        """A role says what a worker is sent, not what it can do: each takes streams from prompt to end alone."""
        return [w for w in self.workers.values() if w.active] if self.complete_once else []

    def standing_in(self) -> str:
        """Who does what nobody is left for, and why; empty while every role is there."""
        standing = self.stand_ins() if self.lacks_role() else []
        if not standing:
            return ""
        return f"{self.lacking()}: {', '.join(worker.name for worker in standing)} does both until then"

    def hands_over(self, worker: Worker) -> bool:
        """Whether what this worker prefills goes on elsewhere."""
        return not worker.decodes and bool(self.decode_workers(worker))

    def has_stream_room(self, worker: Worker) -> bool:
        """Whether one more prompt would not wait there for streams to end."""
        return self.hands_over(worker) or worker.num_streams < worker.hello.max_num_seqs

    def decode_workers(self, owner: Worker) -> list[Worker]:
        """Workers that can take over what `owner` has prefilled."""
        if owner.identity not in self._decode_workers:
            others = [w for w in self.workers.values() if w.decodes and w is not owner]
            self._decode_workers[owner.identity] = [w for w in others if self.mismatch(owner, w) is None]
        return self._decode_workers[owner.identity]

    def forget_derived(self) -> None:
        """Who may get what has changed."""
        self._prefill_workers = None
        self._decode_workers.clear()

    def missing(self) -> str:
        """What stands between now and the first stream that can be served; empty when one can."""
        return "" if self.prefill_workers() else self.lacking()

    def lacking(self) -> str:
        """What stands between now and the first pair of workers, or worker, with all roles; empty when it is there."""
        if not self.lacks_role():
            return ""
        prefills = [worker.name for worker in self.workers.values() if worker.prefills]
        decodes = [worker.name for worker in self.workers.values() if worker.decodes]
        inactive = [f"{worker.name} is {worker.settings.duty}" for worker in self.workers.values() if not worker.active]
        but = f"; {', '.join(inactive)}" if inactive else ""
        if not prefills and not decodes:
            return f"waiting for workers{but}"
        if not prefills:
            return f"waiting for a prefill worker beside {', '.join(decodes)}{but}"
        if not decodes:
            return f"waiting for a decode worker beside {', '.join(prefills)}{but}"
        members = self.workers.values()
        pairs = [(one, other) for one in members if one.prefills for other in members if other.decodes]
        why = next(filter(None, (self.mismatch(one, other) for one, other in pairs)), "")
        return f"no KV can pass between {', '.join(prefills)} and {', '.join(decodes)}: {why}"


def _separated(one: Worker, other: Worker) -> str | None:
    """Why two workers, of which one is on another host, have no way to each other; None when they have."""
    if not (one.hello.distant or other.hello.distant):
        return None
    for worker, far in ((one, other), (other, one)):
        if not crosses_hosts(worker.hello.peer.endpoint):
            return f"{far.name} is on another host than {worker.name}, which listens on its own alone"
        if not crosses_hosts(worker.hello.peer.kv_endpoint):
            return f"{far.name} is on another host than {worker.name}, whose --kv-transfer works within one alone"
    return None
