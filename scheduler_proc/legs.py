"""Starting and cancelling the legs of streams: commands, and what each one costs its worker.

A leg is sent once per attempt; only an explicit Refused allows another target. Otherwise a slow first target and its
replacement would both stream.
"""

from baton.proto.messages import CancelCommand, Sid, StartDecode, StartPrefill
from baton.scheduler_proc.instructions import Outbox
from baton.scheduler_proc.registry import Promise, Registry, Worker
from baton.scheduler_proc.stream import Leg, State, Stream


class Legs:
    """Owns cmd_seq, the streams listed at each worker, and the promises made to it."""

    def __init__(self, registry: Registry, outbox: Outbox) -> None:
        self._registry = registry
        self._outbox = outbox
        self._cmd_seq = 0

    def start_prefill(self, stream: Stream, worker: Worker, hands_over: bool, now: float, shares: bool = False) -> None:
        """Send the prompt; who does not hand over decodes it too. `shares`: all but its end is there."""
        assert stream.params is not None
        self._cmd_seq += 1
        command = StartPrefill(
            epoch=self._registry.epoch,
            cmd_seq=self._cmd_seq,
            sid=stream.sid,
            attempt=stream.attempt,
            prompt_len=stream.prompt_len,
            params=stream.params,
            reply_to=self._reply_to(stream),
            continue_decode=not hands_over,
            priority=stream.priority,
        )
        self._outbox.send(worker.identity, command, stream.frames)
        self._promise(stream, worker, tokens=1 if shares else stream.num_tokens)
        stream.prefilled_by = worker.identity
        stream.prefill = self._leg(worker, self._cmd_seq, now)
        stream.enter(State.PREFILLING, now)

    def start_decode(self, stream: Stream, owner: Worker, worker: Worker, now: float) -> None:
        """Tell a worker to take over from `owner`, whose report is in stream.handoff."""
        assert stream.params is not None
        assert stream.handoff is not None
        self._cmd_seq += 1
        command = StartDecode(
            epoch=self._registry.epoch,
            cmd_seq=self._cmd_seq,
            sid=stream.sid,
            attempt=stream.attempt,
            prompt_len=stream.prompt_len,
            params=stream.params,
            reply_to=self._reply_to(stream),
            lease=stream.handoff.lease,
            owner=owner.hello.peer,
            num_tokens=stream.handoff.num_tokens,
            blocks=stream.handoff.blocks,
            first_rows=stream.handoff.first_rows,
            priority=stream.priority,
            reported_at=stream.handoff.reported_at,
        )
        self._outbox.send(worker.identity, command, stream.frames)
        self._promise(stream, worker, tokens=0)
        stream.decode = self._leg(worker, self._cmd_seq, now)
        stream.enter(State.DECODING, now)

    def adopt(self, stream: Stream, worker: Worker, leg: str, now: float) -> None:
        """Believe a worker that it has a leg which an earlier scheduler started."""
        if leg == "decode":
            stream.decode = self._leg(worker, 0, now)
        else:
            stream.prefill = self._leg(worker, 0, now)
        stream.enter(State.DECODING if stream.decode else State.PREFILLING, now)
        worker.streams[stream.sid] = None

    def drop(self, stream: Stream, leg: Leg) -> None:
        """The worker no longer has this leg, or is no longer there."""
        if stream.prefill is leg:
            stream.prefill = None
        if stream.decode is leg:
            stream.decode = None
        worker = self._registry.workers.get(leg.worker)
        if worker is not None:
            worker.streams.pop(stream.sid, None)
            worker.promises.drop(leg.cmd_seq)

    def cancel_all(self, stream: Stream) -> None:
        """Free what this attempt holds, everywhere."""
        for leg in stream.legs:
            self.cancel(leg.worker, stream.sid, stream.attempt)
            self.drop(stream, leg)

    def cancel(self, worker: bytes, sid: Sid, attempt: int) -> None:
        """Free what a worker holds for this attempt and older ones."""
        if worker in self._registry.workers:
            self._cmd_seq += 1
            self._outbox.send(worker, CancelCommand(self._registry.epoch, self._cmd_seq, sid, attempt))

    def _leg(self, worker: Worker, cmd_seq: int, now: float) -> Leg:
        return Leg(worker.identity, cmd_seq, sent_at=now)

    def _promise(self, stream: Stream, worker: Worker, tokens: int) -> None:
        """`tokens` of its prompt are to be computed."""
        worker.streams[stream.sid] = None
        worker.promises.add(self._cmd_seq, Promise(1, tokens, worker.blocks_for(stream.num_tokens + 1)))

    def _reply_to(self, stream: Stream) -> str:
        return self._registry.frontends[stream.frontend].hello.endpoint
