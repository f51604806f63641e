"""One leg of a stream inside a worker's batcher."""

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from baton.kv_transfer.leases import Lease
from baton.proto.hashing import HASH_UNIT, extend_chain
from baton.proto.lifecycle import Pooling
from baton.proto.logprobs import entry_bytes
from baton.proto.messages import FirstRows, Holder, Ledger, Peer, SamplingParams, Sid


class State(Enum):
    """Drawn at the top of batcher.py."""

    WAITING = auto()
    WAITING_KV = auto()
    KV_HERE = auto()
    COMPILING = auto()
    RUNNING = auto()
    LEASED = auto()
    OVER = auto()


@dataclass(slots=True, eq=False)
class RemoteKV:
    """Where a decode leg's KV comes from, and how far its copy is."""

    lease: int
    owner: Peer
    holder: Holder
    total: int
    """Tokens to have: the whole prompt."""
    source: tuple[int, ...]
    """The owner's blocks that have settled so far."""
    settled: int
    """Tokens in them."""
    first_rows: FirstRows | None
    hit_blocks: int = 0
    """Leading blocks found in our own prefix cache: not pulled."""
    asked_blocks: int = 0
    """Leading blocks that are here or being pulled."""
    pulling: dict[int, int] = field(default_factory=dict)
    """Transfer id -> blocks in it."""
    heard_at: float = 0.0
    """When the owner last answered."""
    opened_at: float = 0.0
    confirm_sent_at: float | None = None
    offered: bool = False
    """Whether our blocks may have been swapped for the owner's by now."""
    swapped: bool = False
    """Whether they have been."""


@dataclass(slots=True, eq=False)
class Request:
    """Counters hold settled <= scheduled <= len(tokens) + placeholders.

    `tokens` are known on the host: prompt, then output. `placeholders` counts tokens that steps in flight will sample.
    `settled` tokens have their KV in `blocks`; `scheduled` will have it when the steps in flight are done.
    """

    sid: Sid
    attempt: int
    leg: str
    prompt_len: int
    params: SamplingParams
    reply_to: str
    tokens: list[int]
    arrived: int
    """Tokens at the start of this attempt: prompt and accepted output. Later ones are sampled here."""
    chain: list[bytes]
    """Root hash, then one per full unit of HASH_UNIT tokens hashed so far."""
    came_s: float
    """When its command came."""
    priority: int = 0
    order: int = 0
    """Arrival number: first come, first served within a priority."""
    hands_over: bool = False
    """A prefill leg whose KV goes to another worker."""
    state: State = State.WAITING
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    scheduled: int = 0
    settled: int = 0
    published: int = 0
    """Leading blocks offered to the prefix cache."""
    placeholders: int = 0
    last_step: int = 0
    residency: int = 0
    """Counts the times it entered the running set; results of an earlier residency settle nothing."""
    emitted: int = 0
    """Output index of the next row."""
    lease: Lease | None = None
    remote: RemoteKV | None = None
    ledger: Ledger = field(default_factory=Ledger)
    """What the next row tells the frontend."""
    computed: int = 0
    """Prompt tokens of this attempt computed here, for the ledger."""
    preemptions: int = 0
    generated: bool = False
    """Whether this leg has sampled a token."""
    stepped: bool = False
    """Whether a decode step has been planned."""
    first_rows: FirstRows | None = None
    """The prefill leg's sample, repeated in this leg's first row."""
    prompt_logprobs: bytearray | None = None
    """PromptLogprobs.data so far; None: nobody wants them, or they have been sent with the first token."""
    shared_key: tuple[str, bytes, tuple[int, ...]] | None = None
    """Under which others find what its blocks hold (shared_prompts.py)."""
    named: tuple[int, tuple[bytes, tuple[int, ...]]] | None = None
    """What prefix_name was asked last, and its answer: a request that waits is asked at every step."""

    @property
    def key(self) -> tuple[Sid, str]:
        """A worker may hold both legs of one stream."""
        return self.sid, self.leg

    @property
    def total(self) -> int:
        """Tokens known or being sampled."""
        return len(self.tokens) + self.placeholders

    @property
    def num_output(self) -> int:
        """Output tokens known or being sampled, earlier attempts' included."""
        return self.total - self.prompt_len

    @property
    def ends_with_prefill(self) -> bool:
        """Whether this leg's first result is its last: it hands over, or a vector is all that is wanted."""
        return self.hands_over or bool(self.params.pooling)

    def pools(self, count: int, last: bool) -> tuple[int, int]:
        """Row.pools and Row.mean_of of a row of so many tokens, which is or is not the prompt's last."""
        if not self.params.pooling:
            return 0, 0
        match self.params.pooling:
            case Pooling.MEAN:
                return count, len(self.tokens) if last else 0
            case Pooling.LAST if last:
                return 1, 1
        return 0, 0

    @property
    def waits_for_token(self) -> bool:
        """What may come next depends on the token that a step in flight will sample."""
        return bool(self.placeholders) and self.params.depends_on_output

    @property
    def reusable(self) -> int:
        """Leading tokens that need not be computed when their KV is there: all but the last, whose logits are wanted.
        Where the prompt's are wanted too, those whose log-probabilities are known."""
        if self.params.pooling == Pooling.MEAN:
            return 0  # blocks have the KV of their tokens, not the hidden states
        if self.prompt_logprobs is None:
            return len(self.tokens) - 1
        return len(self.prompt_logprobs) // entry_bytes(self.params.prompt_logprobs)

    def targets(self, start: int, end: int) -> list[int]:
        """What follows the positions [start, end) in the prompt, where log-probabilities of it are wanted."""
        return [] if self.prompt_logprobs is None else self.tokens[start + 1 : min(end + 1, self.prompt_len)]

    def learn_prompt_logprobs(self, start: int, data: bytes) -> None:
        """Of the tokens that follow the positions from `start` on; some may be known from before a preemption."""
        if self.prompt_logprobs is not None:
            known = len(self.prompt_logprobs) - start * entry_bytes(self.params.prompt_logprobs)
            self.prompt_logprobs += data[known:]

    @property
    def rank(self) -> tuple[int, int]:
        """Lower is served first and preempted last."""
        return self.priority, self.order

    def prefix_name(self, length: int) -> tuple[bytes, tuple[int, ...]]:
        """Names its first `length` tokens and what they depend on: the hash of the full units, and the rest."""
        if self.named is None or self.named[0] != length:
            units = length // HASH_UNIT
            self._hash(units)
            self.named = length, (self.chain[units], tuple(self.tokens[units * HASH_UNIT : length]))
        return self.named[1]

    def block_hashes(self, block_size: int, num_blocks: int) -> list[bytes]:
        """Hash of each of the first `num_blocks` blocks, which must be full: that of its last unit."""
        units = block_size // HASH_UNIT
        self._hash(num_blocks * units)
        return [self.chain[(i + 1) * units] for i in range(num_blocks)]

    def _hash(self, units: int) -> None:
        """Have the chain reach so many full units."""
        hashed = len(self.chain) - 1
        if hashed < units:
            tail = self.tokens[hashed * HASH_UNIT : units * HASH_UNIT]
            self.chain += extend_chain(self.chain[-1], np.asarray(tail, dtype=np.int32))
