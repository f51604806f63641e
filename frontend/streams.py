"""The requests of one frontend, as a state machine: events and a clock in, instructions out. No sockets, no waiting.

A stream is one output sequence. The frontend owns it: it keeps the prompt and every accepted token, and it alone raises
`attempt`, freezing in the same act the prefix that the new attempt continues from.

    submit() ─► SUBMITTING ── Accepted, or a row ──► OPEN ── last token, stop string, ──► CLOSING ── CloseAck ─► gone
                  ▲   │                               │      abort, deadline, error          ▲
                  │   └───────────── Rejected ────────┼──────────────────────────────────────┘
                  └────────── attempt + 1 ────────────┘                             (Finished on entry)
                     Retry, gap timer, lost rows, restarted scheduler

SUBMITTING resends Submit, CLOSING resends Close. Rows come from several workers over links that may lose, and the first
token's worker is not the second's. At (attempt a, n accepted tokens) a row (a', p, T) is treated so:

    a' < a            drop, and tell the sender to cancel
    p + len(T) <= n   a duplicate: drop
    p <= n            accept T[n - p:]
    p > n             hold until the gap closes, or until the gap timer ends the attempt

The prompt's log-probabilities, when wanted, come with the prefill leg's first row and stand before position 0: until
they are here every row is ahead.
A finish counts once n reaches its `final`. Every stream gets exactly one Finished, and no Deliver follows it. A stream
that wants a vector has no tokens: its one row is at position 0, and its end carries the vector.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Sequence

import msgspec
import numpy as np

from baton.frontend.instructions import Deliver, Finished, Instruction, SendToScheduler, SendToWorker, Worker
from baton.frontend.stream import Stream
from baton.proto.channels import Frame
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.lifecycle import FinishReason, Outcome, RejectCode, Stage
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import (
    Accepted,
    Cancelled,
    CancelStream,
    Claim,
    Close,
    CloseAck,
    ClusterStatus,
    Finish,
    FrontendHello,
    Ledger,
    MetricsReply,
    Rejected,
    Retry,
    SamplingParams,
    Sid,
    ToFrontend,
    TokenBatch,
    TokenLogprobs,
    Welcome,
    WhoAreYou,
)

_BUSY = (RejectCode.QUEUE_FULL, RejectCode.NO_WORKERS)
_OUTCOMES: dict[str, Outcome] = {
    FinishReason.STOP: Outcome.STOP,
    FinishReason.LENGTH: Outcome.LENGTH,
    FinishReason.ERROR: Outcome.IMPOSSIBLE,
}


WORKER_MEMORY = 4096
"""Worker incarnations whose channels' numbers are remembered, those heard last. The next batch of another one looks as
if some before it were lost: a stream that then stays without a token goes on under a new attempt."""


class Limits(msgspec.Struct, frozen=True):
    """Bounds of the state machine, in seconds unless said otherwise."""

    gap_timeout_s: float = 0.5
    """A row beyond the next position waits so long for the missing ones."""
    resend_interval_s: float = 1.0
    """Unanswered Submit and Close are sent again this often."""
    suspicion_s: float = 5.0
    """After rows of a worker were lost, a stream that it had not fed yet may stay without a new token for so long."""
    busy_s: float = 30.0
    """A stream that had been admitted is offered again for so long when its next attempt is rejected as busy."""
    max_fruitless: int = 8
    """Attempts in a row without a new token before the request fails."""
    backoff_s: float = 0.05
    """Wait before the second fruitless attempt in a row; doubled for each further one, at most resend_interval_s."""


class Streams:
    """All open requests of one frontend incarnation. Methods return instructions to be carried out in order."""

    def __init__(self, limits: Limits, hello: FrontendHello) -> None:
        """`hello` introduces this frontend; its incarnation is the first half of every sid."""
        self.limits = limits
        self._hello = hello
        self._streams: dict[int, Stream] = {}
        self._closing: OrderedDict[int, tuple[float, Close]] = OrderedDict()  # by time of the next resend
        self._timers: list[tuple[float, int]] = []
        self._seen_seq: dict[Worker, int] = {}  # by when they were heard, the last one last
        self._members: frozenset[Worker] = frozenset()
        self._next_n = 1
        self._epoch = -1

    def __len__(self) -> int:
        """Streams without a terminal event."""
        return len(self._streams)

    @property
    def closing(self) -> int:
        """Ended streams whose Close the scheduler has not acknowledged."""
        return len(self._closing)

    def open_sids(self) -> list[Sid]:
        """Streams without a terminal event, oldest first."""
        return [stream.sid for stream in self._streams.values()]

    def hello(self) -> FrontendHello:
        """The greeting, claiming every stream that a scheduler has accepted."""
        claims = tuple(
            Claim(stream.sid, stream.attempt, len(stream.prompt), stream.request)
            for stream in self._streams.values()
            if stream.answered
        )
        return msgspec.structs.replace(self._hello, claims=claims)

    def submit(
        self,
        prompt: np.ndarray,
        params: SamplingParams,
        now: float,
        *,
        prompt_hashes: bytes | None = None,
        timeout_s: float = 0.0,
        priority: int = 0,
        received_s: float | None = None,
        client: str = "",
        sibling: Sid | None = None,
        request: str = "",
        part: bool = False,
    ) -> tuple[Sid, list[Instruction]]:
        """Open a stream for `prompt` (int32 [prompt_len]).

        prompt_hashes is the packed hash chain of its full units, computed here when None; timeout_s of 0 is none;
        client names who asks, for the ledger, and request what they call it, for operators.
        `sibling` is an earlier stream with the same prompt. A `part` is not counted: `count` is told of the whole.
        """
        prompt = np.ascontiguousarray(prompt, dtype=np.int32)
        if prompt_hashes is None:
            prompt_hashes = pack_hashes(hash_chain(prompt))
        sid = self._new_sid()
        ledger = Ledger(stages={Stage.RECEIVED.value: now if received_s is None else received_s}, client=client)
        deadline = now + timeout_s if timeout_s > 0 else math.inf
        stream = Stream(sid, prompt, prompt_hashes, params, deadline, priority, ledger, submit_at=now)
        stream.sibling = sibling[1] if sibling is not None else 0
        stream.request, stream.part = request, part
        self._streams[sid[1]] = stream
        out = [self._send_submit(stream, now)]
        self._arm(stream)
        return sid, out

    def count(
        self, outcome: Outcome, prompt_tokens: int, output_tokens: int, ledger: Ledger, now: float
    ) -> list[Instruction]:
        """The end of a request whose streams were parts of it."""
        return [self._send_close(Close(self._new_sid(), 1, outcome.value, prompt_tokens, output_tokens, ledger), now)]

    def end(self, sid: Sid, outcome: Outcome, now: float, message: str = "") -> list[Instruction]:
        """The frontend itself ends a stream: stop string (STOP), client gone or shutdown (ABORTED). Idempotent."""
        stream = self._find(sid)
        return [] if stream is None else self._terminate(stream, outcome, now, message)

    def abort(self, sid: Sid, now: float, message: str = "") -> list[Instruction]:
        """End a stream that nobody reads any more. Idempotent."""
        return self.end(sid, Outcome.ABORTED, now, message)

    def on_message(self, message: ToFrontend, now: float) -> list[Instruction]:
        """A message of the scheduler."""
        match message:
            case Accepted():
                self._on_accepted(message)
                return []
            case Rejected():
                return self._on_rejected(message, now)
            case Retry():
                return self._on_retry(message, now)
            case Cancelled():
                return self._on_cancelled(message, now)
            case CloseAck():
                self._closing.pop(message.sid[1], None)
                return []
            case WhoAreYou():
                return self._on_who_are_you(message, now)
            case Welcome():
                self._epoch = message.epoch
                return []
            case ClusterStatus():
                self._on_status(message, now)
                return []
            case MetricsReply():
                return []
        raise TypeError(f"not a message to a frontend: {type(message).__name__}")

    def on_token_batch(self, batch: TokenBatch, now: float, frames: Sequence[Frame] = ()) -> list[Instruction]:
        """One worker step's rows, or its idle beat; none of those meant for an incarnation that had our port before.
        Raises ValueError when the columns do not fit together."""
        told = len(batch.prompt_logprobs)
        if sum(batch.count) != len(batch.tokens) or len(frames) != told + bool(batch.vectors):
            raise ValueError(f"batch {batch.seq} of {batch.worker}: its columns and frames do not fit together")
        prompts = {
            row: PromptLogprobs(top, bytes(frame))
            for (row, top), frame in zip(batch.prompt_logprobs.items(), frames, strict=False)
        }
        vectors = _vectors(batch, frames[told]) if batch.vectors else {}
        worker = (batch.worker, batch.incarnation)
        if batch.frontend != self._hello.frontend:
            rows = zip(batch.n, batch.attempt, strict=True)
            return [SendToWorker(worker, CancelStream((batch.frontend, n), attempt)) for n, attempt in rows]
        self._note_seq(worker, batch, now)
        out: list[Instruction] = []
        start = 0
        columns = zip(batch.n, batch.attempt, batch.pos, batch.count, strict=True)
        for row, (n, attempt, pos, count) in enumerate(columns):
            tokens = batch.tokens[start : start + count]
            start += count
            stream = self._streams.get(n)
            if stream is None or attempt < stream.attempt:
                out.append(SendToWorker(worker, CancelStream((batch.frontend, n), attempt)))
                continue
            if attempt > stream.attempt:
                continue  # only a frontend raises attempts: not ours
            if (part := batch.ledgers.get(row)) is not None:
                stream.ledger.merge(part)
            if stream.lacks_prompt_logprobs and row in prompts:
                stream.learn_prompt_logprobs(prompts[row])
            if row in vectors:
                stream.vector = vectors[row]
            new, logprobs = stream.apply(pos, tokens, batch.logprobs.get(row, ()), batch.finish.get(row))
            self._on_row(stream, new, logprobs, worker, now, out)
        return out

    def tick(self, now: float) -> list[Instruction]:
        """Everything whose time has come."""
        out: list[Instruction] = []
        while self._timers and self._timers[0][0] <= now:
            stream = self._streams.get(heapq.heappop(self._timers)[1])
            if stream is None:
                continue
            stream.timer = math.inf
            self._on_timer(stream, now, out)
            if stream.sid[1] in self._streams:
                self._arm(stream)
        while self._closing:
            n, (at, close) = next(iter(self._closing.items()))
            if at > now:
                break
            out.append(SendToScheduler(close))
            self._closing[n] = (now + self.limits.resend_interval_s, close)
            self._closing.move_to_end(n)
        return out

    def next_deadline(self) -> float:
        """When tick has to be called at the latest; inf when nothing waits. May be too early, never too late."""
        at = self._timers[0][0] if self._timers else math.inf
        if self._closing:
            at = min(at, next(iter(self._closing.values()))[0])
        return at

    def _on_row(
        self,
        stream: Stream,
        tokens: tuple[int, ...],
        logprobs: tuple[TokenLogprobs, ...],
        worker: Worker,
        now: float,
        out: list[Instruction],
    ) -> None:
        """A row of this attempt has come from `worker`, and these tokens are new."""
        if not stream.answered:
            stream.confirm()
        stream.source = worker
        if tokens:
            stream.fruitless = 0
            self._relieve(stream, worker, now)
            first = len(stream.output) == len(tokens)
            if first:
                stream.ledger.stages[Stage.FIRST_TOKEN.value] = now
            out.append(Deliver(stream.sid, tokens, logprobs, stream.prompt_logprobs if first else None))
        if not stream.waits_for_rows():
            stream.gap_until = math.inf
        elif stream.complete():
            assert stream.finish is not None
            out.extend(self._finish(stream, stream.finish, now))
        elif tokens or stream.gap_until == math.inf:
            stream.gap_until = now + self.limits.gap_timeout_s
            self._arm(stream)

    def _note_seq(self, worker: Worker, batch: TokenBatch, now: float) -> None:
        """A hole in the channel's numbering means lost rows, of streams that nobody can name. One that nothing has come
        for yet shows the loss itself: by a gap, or when the scheduler hears of its end."""
        seen = self._seen_seq.pop(worker, 0)
        before = batch.seq - 1 if batch.n else batch.seq
        self._seen_seq[worker] = max(seen, batch.seq)
        if len(self._seen_seq) > WORKER_MEMORY:
            del self._seen_seq[next(iter(self._seen_seq))]
        if before <= seen:
            return
        for stream in self._streams.values():
            if stream.source is not None:
                wait = self.limits.gap_timeout_s if stream.source == worker else self.limits.suspicion_s
                self._suspect(stream, worker, now, wait)

    def _suspect(self, stream: Stream, worker: Worker, now: float, wait: float) -> None:
        """Give the stream a bounded time to show by a new token that the loss was not its own."""
        if now + wait < stream.suspect_until:
            stream.suspect, stream.suspect_until = worker, now + wait
            self._arm(stream)

    def _relieve(self, stream: Stream, worker: Worker, now: float) -> None:
        """A new token clears a suspicion when the suspect sent it, and puts it off when another worker did."""
        if stream.suspect is None:
            return
        if stream.suspect == worker:
            stream.suspect, stream.suspect_until = None, math.inf
        else:
            stream.suspect_until = now + self.limits.suspicion_s

    def _on_accepted(self, message: Accepted) -> None:
        stream = self._find(message.sid)
        if stream is not None and stream.attempt == message.attempt:
            stream.confirm()

    def _on_rejected(self, message: Rejected, now: float) -> list[Instruction]:
        stream = self._find(message.sid)
        if stream is None or stream.attempt != message.attempt or stream.answered:
            return []
        if stream.admitted and message.code in _BUSY:
            stream.busy_since = min(stream.busy_since, now)
            if now - stream.busy_since < self.limits.busy_s:
                return []  # the resend timer offers it again
        if not stream.output:  # nothing has begun that could be resumed
            return self._terminate(stream, Outcome.REJECTED, now, message.message, message.code, message.retry_after_s)
        return self._terminate(stream, Outcome.FAILED, now, f"the request could not be resumed: {message.message}")

    def _on_retry(self, message: Retry, now: float) -> list[Instruction]:
        stream = self._find(message.sid)
        if stream is not None:
            return self._retry(stream, now, message.reason) if stream.attempt == message.attempt else []
        return self._close_again(message.sid, message.attempt)

    def _on_cancelled(self, message: Cancelled, now: float) -> list[Instruction]:
        if self._find(message.sid) is None:
            return self._close_again(message.sid, 0)
        return self.end(message.sid, Outcome.CANCELLED, now, message.message)

    def _close_again(self, sid: Sid, attempt: int) -> list[Instruction]:
        """The scheduler missed the end of a stream: what a lost or overtaken Close leaves behind."""
        if sid[0] != self._hello.frontend or sid[1] in self._closing:
            return []
        return [SendToScheduler(Close(sid, attempt, Outcome.ABORTED.value, 0, 0, Ledger()))]

    def _on_who_are_you(self, message: WhoAreYou, now: float) -> list[Instruction]:
        """Introduce ourselves. A restarted scheduler's predecessor may have started what it had not yet answered, so
        those streams go on under a new attempt."""
        restarted = message.epoch != self._epoch
        self._epoch = message.epoch
        out: list[Instruction] = [SendToScheduler(self.hello())]
        for stream in list(self._streams.values()):
            if stream.answered:
                continue
            if restarted:
                out.extend(self._retry(stream, now, "the scheduler restarted"))
            else:
                out.append(self._send_submit(stream, now))
        out.extend(SendToScheduler(close) for _, close in self._closing.values())
        return out

    def _on_status(self, message: ClusterStatus, now: float) -> None:
        """The scheduler retries what a dead worker still had; rows that it had sent may have been lost with it. Later
        schedulers are told the log levels that an operator has set."""
        self._hello = msgspec.structs.replace(
            self._hello, log_level=message.log_level, scheduler_log_level=message.scheduler_log_level
        )
        members = frozenset((worker.worker, worker.incarnation) for worker in message.workers)
        gone, self._members = self._members - members, members
        if not gone:
            return
        for stream in self._streams.values():
            if stream.source is not None and stream.source in gone:
                self._suspect(stream, stream.source, now, self.limits.suspicion_s)

    def _on_timer(self, stream: Stream, now: float, out: list[Instruction]) -> None:
        if stream.deadline <= now:
            out.extend(self._terminate(stream, Outcome.TIMEOUT, now, "the request's deadline has passed"))
        elif stream.gap_until <= now:
            out.extend(self._retry(stream, now, "tokens were lost between worker and frontend"))
        elif stream.suspect_until <= now and stream.suspect is not None:
            out.extend(self._retry(stream, now, f"rows of {stream.suspect[0]} were lost"))
        elif not stream.answered and stream.submit_at <= now:
            out.append(self._send_submit(stream, now))

    def _retry(self, stream: Stream, now: float, reason: str) -> list[Instruction]:
        """Raise the attempt and continue from the accepted tokens, or end what they show to be complete."""
        if (finish := stream.implied_finish()) is not None:
            return self._finish(stream, finish, now)
        stream.fruitless += 1
        if stream.fruitless > self.limits.max_fruitless:
            message = (
                f"gave up after {stream.fruitless} attempts without a new token; the last one ended with: {reason}"
            )
            return self._terminate(stream, Outcome.FAILED, now, message)
        out = self._cancel(stream)
        stream.next_attempt(reason)
        if stream.fruitless == 1:
            out.append(self._send_submit(stream, now))
        else:
            wait = self.limits.backoff_s * 2 ** (stream.fruitless - 2)
            stream.submit_at = now + min(wait, self.limits.resend_interval_s)
        self._arm(stream)
        return out

    def _send_submit(self, stream: Stream, now: float) -> Instruction:
        stream.submit_at = now + self.limits.resend_interval_s
        stream.ledger.stages.setdefault(Stage.SUBMITTED.value, now)
        return SendToScheduler(*stream.submit_message(now))

    def _finish(self, stream: Stream, finish: Finish, now: float) -> list[Instruction]:
        message = finish.message or "the worker failed" if finish.reason == FinishReason.ERROR else ""
        return self._close(stream, _OUTCOMES.get(finish.reason, Outcome.FAILED), now, message)

    def _terminate(
        self, stream: Stream, outcome: Outcome, now: float, message: str, code: str = "", retry_after_s: float = 0.0
    ) -> list[Instruction]:
        """End what may still be running: the worker that feeds it hears so directly, the others by the scheduler."""
        return self._cancel(stream) + self._close(stream, outcome, now, message, code, retry_after_s)

    def _close(
        self, stream: Stream, outcome: Outcome, now: float, message: str, code: str = "", retry_after_s: float = 0.0
    ) -> list[Instruction]:
        del self._streams[stream.sid[1]]
        stream.ledger.stages[Stage.FINISHED.value] = now
        return [
            self._send_close(stream.close_message(outcome), now),
            Finished(
                stream.sid, outcome, stream.ledger, len(stream.output), message, code, retry_after_s, stream.vector
            ),
        ]

    def _send_close(self, close: Close, now: float) -> Instruction:
        self._closing[close.sid[1]] = (now + self.limits.resend_interval_s, close)
        return SendToScheduler(close)

    def _new_sid(self) -> Sid:
        self._next_n += 1
        return (self._hello.frontend, self._next_n - 1)

    def _cancel(self, stream: Stream) -> list[Instruction]:
        if stream.source is None:
            return []
        return [SendToWorker(stream.source, CancelStream(stream.sid, stream.attempt))]

    def _find(self, sid: Sid) -> Stream | None:
        return self._streams.get(sid[1]) if sid[0] == self._hello.frontend else None

    def _arm(self, stream: Stream) -> None:
        """One heap entry per stream is live: a later due time is found out when the earlier entry fires."""
        due = stream.due()
        if due < stream.timer:
            stream.timer = due
            heapq.heappush(self._timers, (due, stream.sid[1]))


def _vectors(batch: TokenBatch, frame: Frame) -> dict[int, bytes]:
    """Row -> vector; copies, so that none keeps the others' memory. Raises ValueError."""
    data = memoryview(frame)
    size, rest = divmod(data.nbytes, len(batch.vectors))
    if not size or rest or size % 4:
        raise ValueError(
            f"batch {batch.seq} of {batch.worker}: {data.nbytes} bytes are not {len(batch.vectors)} vectors"
        )
    return {row: bytes(data[index * size : (index + 1) * size]) for index, row in enumerate(batch.vectors)}
