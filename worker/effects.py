"""What the batcher asks its worker to do. The IO loop and the simulation both carry these out."""

from dataclasses import dataclass

from baton.kv_transfer.contract import Pull
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import (
    Confirm,
    Finish,
    Gone,
    Holder,
    Ledger,
    Message,
    Ok,
    Open,
    Peer,
    Prompts,
    Settled,
    Sid,
    Swap,
    TokenLogprobs,
    Withdraw,
)


@dataclass(slots=True, frozen=True)
class ToScheduler:
    """Send on the control plane."""

    message: Message


@dataclass(slots=True, frozen=True)
class ToOwner:
    """Send to the worker that owns a lease."""

    owner: Peer
    message: Open | Confirm


@dataclass(slots=True, frozen=True)
class ToHolder:
    """Send to the worker that holds one of our leases."""

    holder: Holder
    message: Settled | Ok | Gone


@dataclass(slots=True, frozen=True)
class ToKeeper:
    """Send to the keeper of the pool."""

    message: Swap | Withdraw | Prompts


@dataclass(slots=True, frozen=True)
class Emit:
    """One row of a TokenBatch for the stream's frontend."""

    reply_to: str
    """The frontend's token-plane address."""
    sid: Sid
    attempt: int
    pos: int
    """Output index of the first token."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    finish: Finish | None = None
    ledger: Ledger | None = None
    prompt_logprobs: PromptLogprobs | None = None
    vector: bytes = b""
    """The result of a stream without tokens: float32 [hidden_size]."""


@dataclass(slots=True, frozen=True)
class Compile:
    """Compile a grammar, away from the loop, and keep it until as many Releases; answered by a Compiled."""

    grammar: str


@dataclass(slots=True, frozen=True)
class Release:
    """One request less needs this grammar."""

    grammar: str


@dataclass(slots=True, frozen=True)
class Compiled:
    """An event for the batcher: streams with this grammar may run, or never will."""

    grammar: str
    error: str = ""


Effect = ToScheduler | ToOwner | ToHolder | ToKeeper | Emit | Pull | Compile | Release
