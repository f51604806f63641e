"""The life of a request, and the moments of it that are timed.

    RECEIVED ─► QUEUED ─► PREFILLING ─► HANDOFF ─► DECODING ─► FINISHED
                    │          │           │           │
                    └──────────┴─────┬─────┴───────────┘
                            ABORTED (client)  or  RECOVERING ─► QUEUED (attempt + 1)  or  FAILED (error to client)

The frontend owns the whole of it (frontend/streams.py); the scheduler's cluster.py caches QUEUED to DECODING; a
worker's batcher.py knows only its own leg.
"""

from collections.abc import Mapping
from enum import StrEnum


class Stage(StrEnum):
    """Moments of a request, as seconds on the CLOCK_MONOTONIC of the scheduler's host.

    Processes of a host have one clock; workers on other hosts translate (worker/clock.py).

    A ledger holds at most one time per stage: the latest attempt's.
    """

    RECEIVED = "received"
    """HTTP or gRPC request parsed (frontend)."""
    SUBMITTED = "submitted"
    """Validated, tokenised, sent to the scheduler (frontend)."""
    STARTED = "started"
    """StartPrefill reached the prefill worker's batcher."""
    SCHEDULED = "scheduled"
    """The first chunk entered a step (prefill worker)."""
    SAMPLED = "sampled"
    """The first token of this attempt was sampled and sent to the frontend (prefill worker)."""
    REPORTED = "reported"
    """PrefillDone reached the scheduler; absent when the stream was bound before, while its prompt was computed."""
    BOUND = "bound"
    """StartDecode reached the decode worker's batcher."""
    PULL_ISSUED = "pull_issued"
    """The first pull was handed to the transport (decode worker)."""
    PULLED = "pulled"
    """The last block's copy was complete (decode worker)."""
    CONFIRMED = "confirmed"
    """The lease's owner said Ok (decode worker)."""
    STEPPED = "stepped"
    """The first decode step that includes this request was launched (decode worker)."""
    FIRST_TOKEN = "first_token"
    """The first token of the stream was accepted by the frontend."""
    FINISHED = "finished"
    """The terminal message was produced (frontend)."""


_HANDOFF = (
    *(Stage.SAMPLED, Stage.REPORTED, Stage.BOUND, Stage.PULL_ISSUED, Stage.PULLED, Stage.CONFIRMED),
    Stage.STEPPED,
)
HANDOFF_PARTS = _HANDOFF[1:]
"""Parts of a handoff, each named after the moment that ends it."""


def handoff_parts(stages: Mapping[str, float]) -> dict[Stage, float]:
    """Seconds of each part; their sum is the handoff's own time, from SAMPLED to STEPPED. Empty without a handoff.

    What happened before the first token, as when a long prompt moves while it is computed, takes nothing of it, nor
    does a moment that did not come, as when there was nothing to pull.
    """
    if Stage.SAMPLED not in stages or Stage.STEPPED not in stages:
        return {}
    before, last = stages[Stage.SAMPLED], stages[Stage.STEPPED]
    if last < before:
        return {}
    parts = {}
    for stage in HANDOFF_PARTS:
        at = min(max(stages.get(stage, before), before), last)
        parts[stage], before = at - before, at
    return parts


class FinishReason(StrEnum):
    """Why a worker ended a stream. Stop strings are the frontend's alone and appear to clients as STOP."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"
    """What the request demands of its output leaves no token to go on with."""


class Outcome(StrEnum):
    """How a request ended, told by the frontend in Close; a label of baton_requests_total."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"
    IMPOSSIBLE = "impossible"
    """What the request demands of its output left no token to go on with."""
    REJECTED = "rejected"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"
    """By an operator."""


class Role(StrEnum):
    """What the scheduler sends to a worker; every worker program can do both legs."""

    PREFILL = "prefill"
    DECODE = "decode"
    UNIFIED = "unified"


class Duty(StrEnum):
    """Whether a worker gets streams."""

    ACTIVE = "active"
    DRAINING = "draining"
    """No new ones; those that it has run to their end."""
    LEAVING = "leaving"
    """It ends for good: its launcher does not start it again."""


class Pooling(StrEnum):
    """How a prompt's hidden states, after the last norm, become one vector."""

    LAST = "LAST"
    """That of the last token."""
    MEAN = "MEAN"
    """The average over all tokens."""


class RejectCode(StrEnum):
    """Why a request was not admitted."""

    QUEUE_FULL = "queue_full"
    TOO_LONG = "too_long"
    NO_WORKERS = "no_workers"
    DEADLINE = "deadline"
    SHUTTING_DOWN = "shutting_down"
