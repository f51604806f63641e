"""A frontend process: the real streams between simulated sockets, and the clients that judge what they get."""

from dataclasses import dataclass, field

import numpy as np

from baton.frontend.instructions import Deliver, Finished, Instruction, SendToScheduler, SendToWorker
from baton.frontend.streams import Limits, Streams
from baton.proto import PROTOCOL_VERSION
from baton.proto.channels import identity
from baton.proto.lifecycle import Outcome
from baton.proto.messages import Beat, FrontendHello, Message, SamplingParams, Sid, TokenBatch

from .model import NOISE, Reference
from .network import Network
from .world import Process, World

BEAT_INTERVAL_S = 0.5


@dataclass
class Call:
    """One request, as its client sees it."""

    prompt: list[int]
    params: SamplingParams
    reference: Reference
    timeout_s: float = 0.0
    vector: bytes = b""
    """What must come, where that is wanted instead of tokens."""
    priority: int = 0
    contexts: frozenset[int] = frozenset()
    """How long sequences may be at workers: where one ends, its stream ends."""
    received: list[int] = field(default_factory=list)
    outcome: Outcome | None = None
    message: str = ""
    code: str = ""
    """Why it was rejected."""
    attempts: int = 1
    orphaned: bool = False
    """Its frontend died: nobody is left to answer."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow."""
        received, params = self.received, self.params
        return len(received) == params.max_tokens or (bool(received) and received[-1] in params.stop_token_ids)

    @property
    def num_tokens(self) -> int:
        """Of prompt and output."""
        return len(self.prompt) + len(self.received)


class Frontend(Process):
    """One frontend over all its lives."""

    def __init__(self, world: World, network: Network, name: str) -> None:
        super().__init__(world, name)
        self._network = network
        self.streams: Streams | None = None
        self._calls: dict[Sid, Call] = {}
        self.calls: list[Call] = []
        """All calls of all lives."""

    def start(self) -> None:
        """A new process without requests."""
        self.alive = True
        self._incarnation = self.world.rng.getrandbits(48)
        self._identity = identity(self.name, self._incarnation)
        endpoint = f"frontend:{self._identity.decode()}"
        hello = FrontendHello(self._incarnation, self.name, endpoint, self.life + 1, PROTOCOL_VERSION)
        self.streams = Streams(Limits(), hello)
        self._beat_at = float("-inf")
        self._network.bind(self, self._identity.decode(), self._on_control)
        self._network.bind(self, endpoint, self._on_tokens)
        self._network.send(self, "scheduler", self._identity, self.streams.hello(), dealer=True)
        self.turn()

    def kill(self) -> None:
        """Its clients' connections break."""
        super().kill()
        self._network.unbind(self)
        for call in self._calls.values():
            call.orphaned = call.outcome is None
        self._calls.clear()
        self.streams = None

    def submit(self, call: Call, sibling: Sid | None = None) -> Sid | None:
        """A client asks, for one more sample of `sibling`'s prompt when given; None when nobody listens."""
        if self.streams is None:
            return None
        self.calls.append(call)
        prompt = np.asarray(call.prompt, dtype=np.int32)
        sid, out = self.streams.submit(
            prompt, call.params, self.world.now, timeout_s=call.timeout_s, priority=call.priority, sibling=sibling
        )
        self._calls[sid] = call
        self._carry_out(out)
        return sid

    def abort(self, sid: Sid) -> None:
        """A client has gone."""
        if self.streams is not None:
            self._carry_out(self.streams.abort(sid, self.world.now))

    def turn(self) -> None:
        """Timers."""
        if self.streams is None:
            return
        self._carry_out(self.streams.tick(self.world.now))

    def _on_control(self, _sender: bytes, message: Message, _frames: tuple[bytes, ...]) -> None:
        if self.streams is not None:
            self._carry_out(self.streams.on_message(message, self.world.now))

    def _on_tokens(self, _sender: bytes, message: Message, frames: tuple[bytes, ...]) -> None:
        assert isinstance(message, TokenBatch)
        if self.streams is not None:
            self._carry_out(self.streams.on_token_batch(message, self.world.now, frames))

    def _carry_out(self, instructions: list[Instruction]) -> None:
        assert self.streams is not None
        for instruction in instructions:
            match instruction:
                case SendToScheduler():
                    message, frames = instruction.message, instruction.frames
                    self._network.send(self, "scheduler", self._identity, message, frames, dealer=True)
                case SendToWorker():
                    worker = identity(*instruction.worker).decode()
                    sender = f"frontend:{self._identity.decode()}".encode()
                    self._network.send(self, f"tokens:{worker}", sender, instruction.message)
                case Deliver():
                    self._deliver(self._calls[instruction.sid], instruction)
                case Finished():
                    self._finished(instruction)
        now = self.world.now
        if now - self._beat_at >= BEAT_INTERVAL_S:
            self._beat_at = now
            beat = Beat(self.name, self._incarnation)
            self._network.send(self, "scheduler", self._identity + b":beat", beat, dealer=True)
        self.wake(min(self.streams.next_deadline(), self._beat_at + BEAT_INTERVAL_S))

    def _deliver(self, call: Call, instruction: Deliver) -> None:
        assert call.outcome is None, f"tokens after {call.outcome}"
        told = instruction.prompt_logprobs
        wanted = call.params.prompt_logprobs >= 0 and not call.received
        assert (told.data if told else None) == (call.reference.prompt_logprobs if wanted else None)
        for token in instruction.tokens:
            assert not call.complete, f"token {token} after the end: {call.received}"
            outcome = token // NOISE
            assert outcome == call.reference.next, f"{outcome} instead of {call.reference.next} after {call.received}"
            call.received.append(token)
            call.reference.append(token)

    def _finished(self, event: Finished) -> None:
        call = self._calls[event.sid]
        assert call.outcome is None, f"ended twice: {call.outcome}, then {event.outcome}"
        call.outcome, call.message, call.code = event.outcome, event.message, event.reject_code
        call.attempts = event.ledger.attempts
        if event.outcome in (Outcome.STOP, Outcome.LENGTH):
            cut_off = event.outcome is Outcome.LENGTH and call.num_tokens in call.contexts
            assert call.complete or cut_off, f"{event.outcome} after {call.received}"
            assert event.vector == call.vector, f"vector {event.vector.hex()} instead of {call.vector.hex()}"
