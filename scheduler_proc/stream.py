"""The scheduler's cache of one output stream, and the queue of those that wait for a prefill worker.

    Submit ─► QUEUED ── StartPrefill ─► PREFILLING ── StartDecode or FirstToken ─► DECODING ── Ended ─► ENDED ─► Close
                 ▲                          │  PrefillDone, no decode worker yet: HANDOFF      │          │
                 │                          └───────────────────┬──────────────────────────────┴──────────┘
                 └────────── Submit(attempt + 1) ───────── RECOVERING (Retry, Rejected, Cancelled: until answered)

    after a restart of the scheduler: Claim ─► CLAIMED ── a worker holds it ─► PREFILLING | DECODING, else RECOVERING

Close ends it from every state. The frontend owns the request: whatever is lost here is rebuilt from it.
"""

import heapq
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from baton.proto.channels import Frame
from baton.proto.messages import Cancelled, FirstRows, Rejected, Retry, SamplingParams, Sid


class State(Enum):
    """See the picture above."""

    QUEUED = auto()
    PREFILLING = auto()
    HANDOFF = auto()
    DECODING = auto()
    ENDED = auto()
    RECOVERING = auto()
    CLAIMED = auto()


@dataclass(slots=True, eq=False)
class Leg:
    """A stream's stay on one worker, from the command to Ended."""

    worker: bytes
    """Identity."""
    cmd_seq: int
    """Of the command that started it; 0 when it was adopted after a restart."""
    sent_at: float
    absent_since: float | None = None
    """First report that should have listed the leg among the worker's holdings and did not."""


@dataclass(slots=True, eq=False)
class Handoff:
    """What the prefill worker has reported of its lease."""

    lease: int
    num_tokens: int
    blocks: tuple[int, ...]
    first_rows: FirstRows | None
    reported_at: float = 0.0
    """When PrefillDone came; 0 before."""


@dataclass(slots=True, eq=False)
class Stream:
    """One attempt of one stream."""

    sid: Sid
    attempt: int
    frontend: bytes
    """Identity."""
    prompt_len: int
    since: float
    """When the present state began."""
    state: State
    params: SamplingParams | None = None
    """None for a claimed stream whose Submit this scheduler never saw."""
    frames: tuple[Frame, ...] = ()
    """int32 prompt ‖ accepted; block hashes. Dropped when no worker can need them under this attempt."""
    num_tokens: int = 0
    """In the first frame."""
    priority: int = 0
    deadline: float = float("inf")
    prefill: Leg | None = None
    decode: Leg | None = None
    handoff: Handoff | None = None
    refused_by: dict[bytes, str] = field(default_factory=dict)
    """Workers that refused a leg of this attempt, with the reason."""
    notice: Retry | Rejected | Cancelled | None = None
    """In RECOVERING: what the frontend was told, resent until it answers."""
    notice_at: float = 0.0
    arrived: float = 0.0
    """When its first attempt was submitted, or claimed."""
    sibling: Sid | None = None
    """An earlier stream with the same prompt."""
    request: str = ""
    """What its client calls the request that it belongs to."""
    prefilled_by: bytes = b""
    """The worker that was sent its prompt."""

    @property
    def id(self) -> str:
        """For operators."""
        return f"{self.sid[0]:x}-{self.sid[1]}"

    @property
    def pooled(self) -> bool:
        """Whether a vector is all that is wanted, so that the prefill is all of it."""
        return self.params is not None and bool(self.params.pooling)

    @property
    def begun(self) -> bool:
        """Whether an earlier attempt has brought tokens."""
        return self.num_tokens > self.prompt_len

    @property
    def room(self) -> int:
        """Tokens that it needs room for: those that it has and one of output, if it wants any."""
        return self.num_tokens + min(self.params.max_tokens if self.params else 0, 1)

    @property
    def legs(self) -> list[Leg]:
        """Where it is."""
        return [leg for leg in (self.prefill, self.decode) if leg is not None]

    def leg_on(self, worker: bytes) -> Leg | None:
        """A worker has at most one leg of a stream: who prefills and decodes does so in one."""
        return next((leg for leg in self.legs if leg.worker == worker), None)

    def enter(self, state: State, now: float) -> None:
        """Change the state."""
        self.state = state
        self.since = now


class AdmissionQueue:
    """Streams waiting for a prefill worker: lowest priority value first, then whose first attempt came first.

    Those that want a vector can be told apart: they need no decode worker, and so can go when the others can't.
    """

    def __init__(self) -> None:
        self._heaps: dict[bool, list[tuple[int, float, int, Sid]]] = {False: [], True: []}  # by Stream.pooled
        self._streams: dict[Sid, tuple[int, Stream]] = {}
        self._order = 0

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Stream]:
        return iter([stream for _, stream in self._streams.values()])

    def __contains__(self, stream: Stream) -> bool:
        return stream.sid in self._streams

    def push(self, stream: Stream) -> None:
        """Line up behind those of its priority that arrived before it: one that goes on keeps its place."""
        self._order += 1
        self._streams[stream.sid] = (self._order, stream)
        heapq.heappush(self._heaps[stream.pooled], (stream.priority, stream.arrived, self._order, stream.sid))

    def peek(self, without: Container[bool] = ()) -> Stream | None:
        """Whose turn it is, leaving out those whose `pooled` is in `without`."""
        heads = [head for pooled in self._heaps if pooled not in without and (head := self._head(pooled))]
        return self._streams[min(heads)[-1]][1] if heads else None

    def _head(self, pooled: bool) -> tuple[int, float, int, Sid] | None:
        heap = self._heaps[pooled]
        while heap:
            _, _, order, sid = heap[0]
            entry = self._streams.get(sid)
            if entry is not None and entry[0] == order:
                return heap[0]
            heapq.heappop(heap)
        return None

    def discard(self, stream: Stream) -> None:
        """Leave the queue, if in it."""
        self._streams.pop(stream.sid, None)
