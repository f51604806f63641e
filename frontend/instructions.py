"""What the stream state machine wants done. The engine client carries it out, in order."""

import msgspec

from baton.proto.lifecycle import Outcome
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import CancelStream, Close, FrontendHello, Ledger, Sid, Submit, TokenLogprobs

Worker = tuple[str, int]
"""Name and incarnation: the sender of a TokenBatch."""


class SendToScheduler(msgspec.Struct, frozen=True, gc=False):
    """Instruction: send over the request plane."""

    message: FrontendHello | Submit | Close
    frames: tuple[bytes, ...] = ()


class SendToWorker(msgspec.Struct, frozen=True, gc=False):
    """Instruction: send to a worker over the token plane, if it is still connected."""

    worker: Worker
    message: CancelStream


class Deliver(msgspec.Struct, frozen=True, gc=False):
    """Instruction: these tokens follow the ones delivered before."""

    sid: Sid
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    """One per token when the request asked for them, else empty."""
    prompt_logprobs: PromptLogprobs | None = None
    """With the first tokens when the request asked for them."""


class Finished(msgspec.Struct, frozen=True, gc=False):
    """Instruction: the one terminal event of a stream."""

    sid: Sid
    outcome: Outcome
    ledger: Ledger
    output_tokens: int
    message: str = ""
    """For the client; empty for STOP and LENGTH."""
    reject_code: str = ""
    """A RejectCode when the outcome is REJECTED."""
    retry_after_s: float = 0.0
    vector: bytes = b""
    """The result of a stream that wanted one instead of tokens: float32 [hidden_size], little-endian."""


Instruction = SendToScheduler | SendToWorker | Deliver | Finished
