"""The life of a request, and the moments of it that are timed.

    RECEIVED ─► QUEUED ─► PREFILLING ─► HANDOFF ─► DECODING ─► FINISHED
                    │          │           │           │
                    └──────────┴─────┬─────┴───────────┘
                            ABORTED (client)  or  RECOVERING ─► QUEUED (attempt + 1)  or  FAILED (error to client)

The frontend owns the whole of it (frontend/streams.py); the scheduler's cluster.py caches QUEUED to DECODING; a
worker's batcher.py knows only its own leg.
"""

from enum import StrEnum


class Stage(StrEnum):
    """Moments of a request, as seconds on CLOCK_MONOTONIC (one clock for all processes of a host).

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


class FinishReason(StrEnum):
    """Why a worker ended a stream. Stop strings are the frontend's alone and appear to clients as STOP."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"


class Outcome(StrEnum):
    """How a request ended, told by the frontend in Close; a label of baton_requests_total."""

    STOP = "stop"
    LENGTH = "length"
    ABORTED = "aborted"
    FAILED = "failed"
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
