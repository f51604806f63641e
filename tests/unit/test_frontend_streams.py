"""The frontend's streams on a virtual clock: which rows become text, and what is sent when."""

import random

import numpy as np
import pytest

from baton.frontend.instructions import Deliver, Finished, Instruction, SendToScheduler, SendToWorker
from baton.frontend.streams import WORKER_MEMORY, Limits, Streams
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.lifecycle import Outcome, RejectCode
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
    Rejected,
    Retry,
    SamplingParams,
    Sid,
    Submit,
    TokenBatch,
    TokenLogprobs,
    Welcome,
    WhoAreYou,
    WorkerStatus,
)

PROMPT = np.arange(100, 140, dtype=np.int32)
PREFILL, DECODE = ("prefill-0", 1), ("decode-0", 1)
LIMITS = Limits()
ME = 7


class Frontend:
    """A Streams with everything that it said, and one channel number per worker."""

    def __init__(self) -> None:
        self.streams = Streams(LIMITS, FrontendHello(ME, "frontend-0", "ipc:///tokens", 1, 1))
        self.streams.on_message(Welcome(epoch=1), 0.0)
        self.now = 0.0
        self.said: list[Instruction] = []
        self.seq: dict[tuple[str, int], int] = {}

    def do(self, instructions: list[Instruction]) -> list[Instruction]:
        self.said += instructions
        return instructions

    def submit(
        self, max_tokens: int = 100, *, timeout_s: float = 0.0, accepted: bool = True, prompt_logprobs: int = -1
    ) -> Sid:
        params = SamplingParams(max_tokens=max_tokens, stop_token_ids=(2,), prompt_logprobs=prompt_logprobs)
        sid, said = self.streams.submit(PROMPT, params, self.now, timeout_s=timeout_s)
        self.do(said)
        if accepted:
            self.message(Accepted(sid, 1))
        return sid

    def message(self, message: object) -> list[Instruction]:
        return self.do(self.streams.on_message(message, self.now))  # type: ignore[arg-type]

    def row(
        self,
        sid: Sid,
        pos: int,
        tokens: list[int],
        *,
        final: int = 0,
        attempt: int = 1,
        worker: tuple[str, int] = DECODE,
        skip: int = 0,
        reason: str = "length",
        ledger: Ledger | None = None,
        logprobs: tuple[TokenLogprobs, ...] = (),
        prompt_logprobs: bytes | None = None,
    ) -> list[Instruction]:
        """One row in a batch of its own; `skip` batches before it were lost."""
        seq = self.seq[worker] = self.seq.get(worker, 0) + 1 + skip
        batch = TokenBatch(
            *worker,
            seq,
            (sid[1],),
            (attempt,),
            (pos,),
            (len(tokens),),
            tuple(tokens),
            finish={0: Finish(reason, final, "broken" if reason == "error" else "")} if final else {},
            ledgers={0: ledger} if ledger else {},
            logprobs={0: logprobs} if logprobs else {},
            prompt_logprobs={} if prompt_logprobs is None else {0: 0},
            frontend=sid[0],
        )
        frames = () if prompt_logprobs is None else (prompt_logprobs,)
        return self.do(self.streams.on_token_batch(batch, self.now, frames))

    def beat(self, worker: tuple[str, int], seq: int) -> list[Instruction]:
        return self.do(self.streams.on_token_batch(TokenBatch(*worker, seq, frontend=ME), self.now))

    def sleep(self, seconds: float) -> list[Instruction]:
        """Let time pass, waking exactly when the machine asks to be woken."""
        end, said = self.now + seconds, []
        while (at := self.streams.next_deadline()) <= end:
            self.now = max(self.now, at)
            said += self.do(self.streams.tick(self.now))
        self.now = end
        return said

    def text(self, sid: Sid) -> list[int]:
        return [token for i in self.said if isinstance(i, Deliver) and i.sid == sid for token in i.tokens]

    def ends(self, sid: Sid) -> list[Finished]:
        return [i for i in self.said if isinstance(i, Finished) and i.sid == sid]


def sent(said: list[Instruction], kind: type) -> list:
    """Messages of one type to the scheduler."""
    return [i.message for i in said if isinstance(i, SendToScheduler) and isinstance(i.message, kind)]


def cancels(said: list[Instruction]) -> list[tuple[tuple[str, int], CancelStream]]:
    return [(i.worker, i.message) for i in said if isinstance(i, SendToWorker)]


@pytest.fixture
def frontend() -> Frontend:
    return Frontend()


def test_submit_carries_the_prompt_and_its_hashes(frontend: Frontend) -> None:
    frontend.submit()
    submit = frontend.said[0]
    assert isinstance(submit, SendToScheduler)
    assert isinstance(submit.message, Submit)
    assert submit.message.prompt_len == 40
    assert submit.frames == (PROMPT.tobytes(), pack_hashes(hash_chain(PROMPT)))


def test_submit_is_resent_until_it_is_answered(frontend: Frontend) -> None:
    sid = frontend.submit(accepted=False)
    assert len(sent(frontend.sleep(3.5), Submit)) == 3
    frontend.message(Accepted(sid, 1))
    assert sent(frontend.sleep(10), Submit) == []


def test_a_row_answers_a_submit(frontend: Frontend) -> None:
    sid = frontend.submit(accepted=False)
    frontend.row(sid, 0, [5])
    assert sent(frontend.sleep(10), Submit) == []


def test_rows_become_text_and_the_finish_ends_the_stream_once(frontend: Frontend) -> None:
    sid = frontend.submit(max_tokens=3)
    frontend.row(sid, 0, [11], worker=PREFILL)
    frontend.row(sid, 0, [11, 12])
    said = frontend.row(sid, 2, [13], final=3)
    assert frontend.text(sid) == [11, 12, 13]
    assert [type(i) for i in said] == [Deliver, SendToScheduler, Finished]
    (end,) = frontend.ends(sid)
    assert (end.outcome, end.output_tokens, end.message) == (Outcome.LENGTH, 3, "")
    assert cancels(frontend.said) == []


@pytest.mark.parametrize("late_first", [False, True])
def test_the_first_token_may_come_from_either_worker_first(frontend: Frontend, late_first: bool) -> None:
    sid = frontend.submit()
    if late_first:
        frontend.row(sid, 0, [11, 12])
        frontend.row(sid, 0, [11], worker=PREFILL)
    else:
        frontend.row(sid, 0, [11], worker=PREFILL)
        frontend.row(sid, 0, [11, 12])
    assert frontend.text(sid) == [11, 12]


def test_overlap_is_trimmed_with_its_logprobs(frontend: Frontend) -> None:
    sid = frontend.submit()
    marks = tuple(TokenLogprobs(-float(i), 1) for i in range(4))
    frontend.row(sid, 0, [10, 11], logprobs=marks[:2])
    (deliver,) = frontend.row(sid, 1, [11, 12, 13], logprobs=marks[1:])
    assert deliver == Deliver(sid, (12, 13), marks[2:])


def test_a_gap_that_closes_in_time_costs_nothing(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10])
    frontend.row(sid, 2, [12], final=3)
    frontend.sleep(0.4)
    frontend.row(sid, 1, [11])
    assert frontend.text(sid) == [10, 11, 12]
    assert frontend.ends(sid)[0].outcome is Outcome.LENGTH


def test_a_gap_that_stays_open_raises_the_attempt_from_the_accepted_tokens(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10])
    frontend.row(sid, 2, [12])
    said = frontend.sleep(0.5)
    assert cancels(said) == [(DECODE, CancelStream(sid, 1))]
    (submit,) = [i for i in said if isinstance(i, SendToScheduler)]
    assert (submit.message.attempt, submit.message.prompt_len) == (2, 40)  # type: ignore[union-attr]
    tokens = np.append(PROMPT, np.int32(10))
    assert submit.frames == (tokens.tobytes(), pack_hashes(hash_chain(tokens)))


def test_rows_of_an_older_attempt_are_dropped_and_their_sender_is_told(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10])
    frontend.message(Retry(sid, 1, "decode-0 died"))
    said = frontend.row(sid, 1, [99], attempt=1)
    assert cancels(said) == [(DECODE, CancelStream(sid, 1))]
    frontend.row(sid, 1, [11], attempt=2, worker=("decode-1", 1))
    assert frontend.text(sid) == [10, 11]


def test_a_retry_of_another_attempt_is_ignored(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.message(Retry(sid, 1, "once"))
    assert frontend.message(Retry(sid, 1, "and again")) == []


def test_resubmitted_hashes_cover_the_accepted_tokens(frontend: Frontend) -> None:
    sid = frontend.submit()
    output = list(range(200, 230))
    frontend.row(sid, 0, output)
    (instruction,) = [i for i in frontend.message(Retry(sid, 1, "")) if isinstance(i, SendToScheduler)]
    tokens = np.concatenate([PROMPT, np.array(output, dtype=np.int32)])
    assert instruction.frames[1] == pack_hashes(hash_chain(tokens))
    assert len(instruction.frames[1]) == (1 + 4) * 16


def test_a_retry_of_a_complete_stream_ends_it(frontend: Frontend) -> None:
    stopped, full = frontend.submit(), frontend.submit(max_tokens=2)
    frontend.row(stopped, 0, [10, 2])
    frontend.row(full, 0, [10, 11])
    frontend.message(Retry(stopped, 1, "died with the finish unsent"))
    frontend.message(Retry(full, 1, "died with the finish unsent"))
    assert frontend.ends(stopped)[0].outcome is Outcome.STOP
    assert frontend.ends(full)[0].outcome is Outcome.LENGTH


def test_attempts_without_progress_are_spaced_and_bounded(frontend: Frontend) -> None:
    sid = frontend.submit()
    times = []
    while not frontend.ends(sid):
        attempt = 1 + len(times)
        frontend.message(Retry(sid, attempt, "decode-0 died"))
        while not frontend.ends(sid) and sent(frontend.said, Submit)[-1].attempt != attempt + 1:
            frontend.sleep(0.01)
        times.append(frontend.now)
    (end,) = frontend.ends(sid)
    assert end.outcome is Outcome.FAILED
    assert "9 attempts" in end.message
    assert "decode-0 died" in end.message
    assert times[-1] > 2


def test_a_new_token_resets_the_bound_on_attempts(frontend: Frontend) -> None:
    sid = frontend.submit()
    for attempt in range(1, 30):
        frontend.row(sid, attempt - 1, [100 + attempt], attempt=attempt)
        frontend.message(Retry(sid, attempt, ""))
    assert not frontend.ends(sid)
    assert frontend.text(sid) == list(range(101, 130))


def test_a_lost_last_batch_is_seen_by_the_idle_beat(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10])
    frontend.beat(DECODE, 1)
    assert sent(frontend.sleep(10), Submit) == []
    frontend.beat(DECODE, 2)
    (submit,) = sent(frontend.sleep(0.5), Submit)
    assert submit.attempt == 2


def test_a_stream_that_goes_on_after_lost_rows_is_left_alone(frontend: Frontend) -> None:
    mine, other = frontend.submit(), frontend.submit()
    frontend.row(mine, 0, [10])
    frontend.row(other, 0, [10])
    frontend.row(mine, 1, [11], skip=1)
    retried = {(submit.sid, submit.attempt) for submit in sent(frontend.sleep(2), Submit)}
    assert retried == {(other, 2)}


def test_a_stream_whose_only_row_was_lost_is_found_too(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10], worker=PREFILL)
    frontend.beat(DECODE, 1)
    assert sent(frontend.sleep(4.9), Submit) == []
    assert [submit.attempt for submit in sent(frontend.sleep(0.2), Submit)] == [2]


def test_a_stream_fed_by_a_worker_that_left_goes_on_elsewhere(frontend: Frontend) -> None:
    def status(*workers: tuple[str, int]) -> ClusterStatus:
        return ClusterStatus(1, True, "", tuple(WorkerStatus(*worker, "decode", 1, 1, 0, 0) for worker in workers))

    sid = frontend.submit()
    frontend.message(status(PREFILL, DECODE))
    frontend.row(sid, 0, [10])
    frontend.message(status(PREFILL))
    assert {submit.attempt for submit in sent(frontend.sleep(6), Submit)} == {2}


def test_rejection_ends_the_stream_with_its_reason(frontend: Frontend) -> None:
    sid = frontend.submit(accepted=False)
    frontend.message(Rejected(sid, 1, RejectCode.QUEUE_FULL, "4096 requests are waiting", 2.0))
    (end,) = frontend.ends(sid)
    assert (end.outcome, end.reject_code, end.retry_after_s) == (Outcome.REJECTED, "queue_full", 2.0)


def test_a_running_stream_outlasts_a_busy_moment_but_not_a_long_one(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10])
    frontend.message(Retry(sid, 1, "died"))
    for _ in range(20):
        frontend.message(Rejected(sid, 2, RejectCode.NO_WORKERS, "no decode worker"))
        assert sent(frontend.sleep(1), Submit)[-1].attempt == 2
    assert not frontend.ends(sid)
    frontend.sleep(10)
    frontend.message(Rejected(sid, 2, RejectCode.NO_WORKERS, "no decode worker"))
    assert frontend.ends(sid)[0].outcome is Outcome.FAILED


def test_a_stream_without_a_token_that_nobody_can_take_any_more_was_rejected_not_lost(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.message(Retry(sid, 1, "waiting for a prefill worker"))
    frontend.message(Rejected(sid, 2, RejectCode.NO_WORKERS, "waiting for a prefill worker"))
    assert not frontend.ends(sid)
    frontend.sleep(31)
    frontend.message(Rejected(sid, 2, RejectCode.NO_WORKERS, "waiting for a prefill worker"))
    (end,) = frontend.ends(sid)
    assert (end.outcome, end.reject_code) == (Outcome.REJECTED, "no_workers")


def test_close_is_resent_until_acknowledged(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10, 2], final=2, reason="stop")
    assert len(sent(frontend.sleep(3.5), Close)) == 3
    frontend.message(CloseAck(sid))
    assert sent(frontend.sleep(10), Close) == []
    assert frontend.streams.closing == 0
    assert len(frontend.ends(sid)) == 1


def test_a_request_of_many_streams_counts_by_a_close_of_its_own(frontend: Frontend) -> None:
    sid, said = frontend.streams.submit(PROMPT, SamplingParams(max_tokens=1), 0.0, part=True)
    assert sent(said, Submit)
    [part] = sent(frontend.streams.abort(sid, 0.0), Close)
    [whole] = sent(frontend.streams.count(Outcome.LENGTH, 40, 24, Ledger(client="me"), 0.0), Close)
    assert (part.part, whole.part) == (True, False)
    assert (whole.outcome, whole.prompt_tokens, whole.output_tokens, whole.ledger.client) == ("length", 40, 24, "me")
    assert whole.sid != sid
    frontend.message(CloseAck(sid))
    assert sent(frontend.sleep(1.0), Close) == [whole], "it may have been lost"
    frontend.message(CloseAck(whole.sid))
    assert not frontend.streams.closing


@pytest.mark.parametrize("state", ["submitting", "queued", "prefilled", "decoding", "held", "recovering"])
def test_abort_from_every_state_cancels_and_closes(frontend: Frontend, state: str) -> None:
    sid = frontend.submit(accepted=state != "submitting")
    if state in ("prefilled", "decoding", "held", "recovering"):
        frontend.row(sid, 0, [10], worker=PREFILL)
    if state in ("decoding", "held"):
        frontend.row(sid, 0, [10, 11])
    if state == "held":
        frontend.row(sid, 5, [15])
    if state == "recovering":
        frontend.message(Retry(sid, 1, ""))
    said = frontend.do(frontend.streams.abort(sid, frontend.now))
    assert [close.outcome for close in sent(said, Close)] == ["aborted"]
    source = {"prefilled": PREFILL, "decoding": DECODE, "held": DECODE}.get(state)
    assert [worker for worker, _ in cancels(said)] == ([source] if source else [])
    assert frontend.do(frontend.streams.abort(sid, frontend.now)) == []
    late = frontend.row(sid, 6, [16])
    assert [type(i) for i in late] == [SendToWorker]
    frontend.message(CloseAck(sid))
    assert frontend.streams.next_deadline() == float("inf") or frontend.sleep(100) == []
    assert len(frontend.ends(sid)) == 1


def test_a_stop_string_ends_as_stop(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10, 11])
    frontend.do(frontend.streams.end(sid, Outcome.STOP, frontend.now))
    assert frontend.ends(sid)[0].outcome is Outcome.STOP
    assert cancels(frontend.said) == [(DECODE, CancelStream(sid, 1))]


def test_deadline_ends_the_stream_and_travels_with_submit(frontend: Frontend) -> None:
    sid = frontend.submit(timeout_s=5.0, accepted=False)
    frontend.sleep(1.5)
    assert [submit.timeout_s for submit in sent(frontend.said, Submit)] == [5.0, 4.0]
    frontend.sleep(4)
    (end,) = frontend.ends(sid)
    assert end.outcome is Outcome.TIMEOUT
    assert end.ledger.stages["finished"] == 5.0


def test_a_worker_error_reaches_the_client(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10])
    frontend.row(sid, 1, [], final=1, reason="error")
    (end,) = frontend.ends(sid)
    assert (end.outcome, end.message) == (Outcome.IMPOSSIBLE, "broken")


def test_a_restarted_scheduler_gets_claims_and_fresh_attempts_of_what_was_unanswered(frontend: Frontend) -> None:
    running = frontend.submit()
    frontend.row(running, 0, [10])
    unanswered = frontend.submit(accepted=False)
    closed = frontend.submit()
    frontend.do(frontend.streams.abort(closed, frontend.now))
    said = frontend.message(WhoAreYou(epoch=2))
    assert sent(said, FrontendHello)[0].claims == (Claim(running, 1, 40),)
    assert [(submit.sid, submit.attempt) for submit in sent(said, Submit)] == [(unanswered, 2)]
    assert [close.sid for close in sent(said, Close)] == [closed]


def test_the_same_scheduler_asking_again_gets_the_same_attempt(frontend: Frontend) -> None:
    sid = frontend.submit(accepted=False)
    said = frontend.message(WhoAreYou(epoch=1))
    assert [(submit.sid, submit.attempt) for submit in sent(said, Submit)] == [(sid, 1)]


def test_a_request_that_an_operator_cancels_ends_whatever_its_attempt(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.message(Retry(sid, 1, "a worker died"))
    close, end = frontend.message(Cancelled(sid, "an operator cancelled the request"))
    assert isinstance(end, Finished)
    assert (end.outcome, end.message) == (Outcome.CANCELLED, "an operator cancelled the request")
    assert isinstance(close, SendToScheduler)
    assert isinstance(close.message, Close)
    assert frontend.message(Cancelled(sid, "again")) == []


def test_a_cancel_of_a_stream_that_is_over_is_answered_with_its_end(frontend: Frontend) -> None:
    (said,) = frontend.message(Cancelled((7, 99), "an operator cancelled the request"))
    assert isinstance(said, SendToScheduler)
    assert isinstance(said.message, Close)


def test_a_retry_of_a_stream_that_is_over_is_answered_with_its_end(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.do(frontend.streams.abort(sid, frontend.now))
    frontend.message(CloseAck(sid))
    said = frontend.message(Retry(sid, 1, "worker died"))
    assert [close.sid for close in sent(said, Close)] == [sid]


def test_the_ledger_merges_parts_and_times_every_stage(frontend: Frontend) -> None:
    frontend.now = 1.0
    sid = frontend.submit()
    frontend.now = 2.0
    frontend.row(sid, 0, [10], worker=PREFILL, ledger=Ledger(prefill_worker="prefill-0", cached_tokens=16))
    frontend.message(Retry(sid, 1, "decode-0 died"))
    frontend.now = 3.0
    frontend.row(sid, 1, [11], attempt=2, ledger=Ledger(prefill_worker="prefill-1", stages={"sampled": 2.5}))
    frontend.now = 4.0
    frontend.row(sid, 2, [12], attempt=2, final=3, ledger=Ledger(decode_worker="decode-1", transport="shm"))
    ledger = frontend.ends(sid)[0].ledger
    assert (ledger.prefill_worker, ledger.decode_worker, ledger.transport) == ("prefill-1", "decode-1", "shm")
    assert ledger.attempts == 2
    assert ledger.cached_tokens == 0
    assert ledger.notes == ["attempt 1 ended at token 1: decode-0 died"]
    assert ledger.stages == {"received": 1.0, "submitted": 2.0, "first_token": 2.0, "sampled": 2.5, "finished": 4.0}
    assert sent(frontend.said, Close)[0].ledger == ledger


def test_what_names_a_stream_survives_a_retry(frontend: Frontend) -> None:
    sid, said = frontend.streams.submit(PROMPT, SamplingParams(8), frontend.now, client="team", request="mine")
    assert [submit.request for submit in sent(said, Submit)] == ["mine"]
    frontend.message(Accepted(sid, 1))
    said = frontend.message(Retry(sid, 1, "worker died"))
    assert [submit.request for submit in sent(said, Submit)] == ["mine"]
    frontend.message(Accepted(sid, 2))
    assert [claim.request for claim in frontend.streams.hello().claims] == ["mine"]
    said = frontend.do(frontend.streams.abort(sid, frontend.now))
    assert [close.ledger.client for close in sent(said, Close)] == ["team"]


def test_lost_rows_of_others_are_no_failure_of_a_stream_that_waits(frontend: Frontend) -> None:
    waiting, running = frontend.submit(), frontend.submit()
    for position in range(12):
        frontend.row(running, position, [10 + position], skip=1)
        frontend.sleep(8.0)
    assert frontend.text(running) == list(range(10, 22))
    assert {submit.attempt for submit in sent(frontend.said, Submit) if submit.sid == waiting} == {1}
    assert not frontend.ends(waiting)


def test_a_batch_whose_columns_disagree_is_refused(frontend: Frontend) -> None:
    sid = frontend.submit()
    with pytest.raises(ValueError, match="decode-0"):
        frontend.streams.on_token_batch(TokenBatch(*DECODE, 1, (sid[1],), (1,), (0,), (2,), (5,)), 0.0)


def test_rows_for_an_earlier_incarnation_at_the_same_port_are_no_streams_of_ours(frontend: Frontend) -> None:
    """A worker on another host goes on connecting to the port of a frontend that has died."""
    sid = frontend.submit()
    assert frontend.row((ME - 1, sid[1]), 0, [66], skip=3) == [
        SendToWorker(DECODE, CancelStream((ME - 1, sid[1]), 1)),
    ]
    # Nor do the numbers of their channel speak of losses in ours.
    assert sent(frontend.sleep(LIMITS.suspicion_s + 1.0), Submit) == []
    frontend.seq.clear()
    frontend.row(sid, 0, [10])
    assert frontend.text(sid) == [10]


def test_no_row_counts_before_the_prompts_logprobs_are_here(frontend: Frontend) -> None:
    """They come with the prefill leg's row alone, and the decode leg's may be faster."""
    sid = frontend.submit(prompt_logprobs=0)
    assert frontend.row(sid, 0, [10, 11]) == []
    (delivered,) = frontend.row(sid, 0, [10], worker=PREFILL, prompt_logprobs=b"told")
    assert isinstance(delivered, Deliver)
    assert (delivered.tokens, delivered.prompt_logprobs) == ((10, 11), PromptLogprobs(0, b"told"))
    (later,) = frontend.row(sid, 2, [12], final=3)[:1]
    assert isinstance(later, Deliver)
    assert later.prompt_logprobs is None


def test_lost_prompt_logprobs_are_computed_again_and_told_ones_are_not(frontend: Frontend) -> None:
    sid = frontend.submit(prompt_logprobs=0)
    frontend.row(sid, 0, [10, 11])
    (again,) = sent(frontend.sleep(LIMITS.gap_timeout_s + 0.01), Submit)
    assert (again.attempt, again.params.prompt_logprobs) == (2, 0)
    frontend.row(sid, 0, [20], attempt=2, worker=PREFILL, prompt_logprobs=b"told")
    frontend.message(Retry(sid, 2, "died"))
    (third,) = sent(frontend.said, Submit)[2:]
    assert (third.attempt, third.params.prompt_logprobs) == (3, -1)
    assert frontend.text(sid) == [20]


def test_an_error_reaches_a_client_that_waits_for_prompt_logprobs(frontend: Frontend) -> None:
    sid = frontend.submit(prompt_logprobs=0)
    finish = TokenBatch(*PREFILL, 1, (sid[1],), (1,), (0,), (0,), (), {0: Finish("error", 0, "broken")}, frontend=ME)
    frontend.do(frontend.streams.on_token_batch(finish, 0.0))
    assert [end.message for end in frontend.ends(sid)] == ["broken"]


def test_rows_that_wait_for_prompt_logprobs_are_no_obstacle_to_an_error(frontend: Frontend) -> None:
    """A row without tokens counts at once; those that are held go on waiting, and nobody goes round in circles."""
    sid = frontend.submit(prompt_logprobs=0)
    frontend.row(sid, 0, [10, 11])
    finish = TokenBatch(*PREFILL, 1, (sid[1],), (1,), (0,), (0,), (), {0: Finish("error", 0, "broken")}, frontend=ME)
    frontend.do(frontend.streams.on_token_batch(finish, 0.0))
    assert [end.message for end in frontend.ends(sid)] == ["broken"]


AttemptRow = tuple[int, list[int], int]
"""Position, tokens, and the stream's final length on the last row."""


def worker_rows(rng: random.Random, submit: Submit, accepted: list[int], total: int) -> list[AttemptRow]:
    """What an attempt would stream: tokens that depend on the attempt, cut at random, the last with the finish."""
    tokens = [submit.attempt * 1000 + pos for pos in range(total)]
    tokens[: len(accepted)] = accepted
    rows, pos = [], len(accepted)
    while pos < total:
        count = rng.randint(1, 4)
        start = rng.randint(max(len(accepted), pos - 2), pos)
        rows.append((start, tokens[start : pos + count], total if pos + count >= total else 0))
        pos += count
    return rows


@pytest.mark.parametrize("seed", range(300))
def test_text_is_never_spliced_under_loss_reorder_and_duplication(seed: int) -> None:
    """Every attempt draws other tokens, so that one row of a wrong attempt would show."""
    rng = random.Random(seed)
    frontend, total = Frontend(), 40
    sid = frontend.submit(max_tokens=total, accepted=False)
    expected: list[int] = []
    flying: list[tuple[float, int, AttemptRow]] = []
    served = 0
    for _ in range(2000):
        if frontend.ends(sid):
            break
        for i in frontend.said:
            if isinstance(i, SendToScheduler) and isinstance(i.message, Submit) and i.message.attempt > served:
                served = i.message.attempt
                accepted = np.frombuffer(i.frames[0], dtype=np.int32)[i.message.prompt_len :].tolist()
                assert accepted == frontend.text(sid), "the new attempt continues from what was delivered"
                expected = accepted + [served * 1000 + pos for pos in range(len(accepted), total)]
                at = frontend.now
                for row in worker_rows(rng, i.message, accepted, total):
                    at += 0.01
                    copies = rng.choice([0, 1, 1, 1, 1, 1, 1, 1, 2])
                    flying += [(at + rng.random() * 0.1, served, row) for _ in range(copies)]
        if rng.random() < 0.01:
            frontend.message(Retry(sid, served, "a worker died"))
        frontend.sleep(0.01)
        due = [item for item in flying if item[0] <= frontend.now]
        flying = [item for item in flying if item[0] > frontend.now]
        for _, attempt, (pos, tokens, final) in due:
            frontend.row(sid, pos, tokens, final=final, attempt=attempt, worker=(f"decode-{attempt}", 1))
        if not flying:
            frontend.beat((f"decode-{served}", 1), frontend.seq.get((f"decode-{served}", 1), 0) + 1)
    (end,) = frontend.ends(sid)
    assert end.outcome is Outcome.LENGTH
    assert frontend.text(sid) == expected


def vector_batch(sid: Sid, vector: bytes, *, attempt: int = 1, seq: int = 1) -> TokenBatch:
    finish = {0: Finish("stop", 0)}
    return TokenBatch(
        *PREFILL, seq, (sid[1],), (attempt,), (0,), (0,), (), finish, vectors=(0,) if vector else (), frontend=sid[0]
    )


def pooled(frontend: Frontend) -> Sid:
    """A stream that wants a vector."""
    sid, said = frontend.streams.submit(PROMPT, SamplingParams(max_tokens=0, pooling="LAST"), frontend.now)
    frontend.do(said)
    frontend.message(Accepted(sid, 1))
    return sid


def test_a_vector_comes_with_the_end_of_a_stream_without_tokens(frontend: Frontend) -> None:
    sid = pooled(frontend)
    said = frontend.do(frontend.streams.on_token_batch(vector_batch(sid, b"\1" * 8), 0.0, (b"\1" * 8,)))
    [end] = frontend.ends(sid)
    assert (end.outcome, end.output_tokens, end.vector) == (Outcome.STOP, 0, b"\1" * 8)
    assert [close.output_tokens for close in sent(said, Close)] == [0]
    assert frontend.text(sid) == []


def test_vectors_of_several_streams_share_a_frame(frontend: Frontend) -> None:
    sids = [pooled(frontend) for _ in range(3)]
    batch = TokenBatch(
        *PREFILL,
        1,
        tuple(sid[1] for sid in sids),
        (1, 1, 1),
        (0, 0, 0),
        (0, 0, 0),
        (),
        finish={row: Finish("stop", 0) for row in range(3)},
        vectors=(2, 0, 1),
        frontend=ME,
    )
    frontend.do(frontend.streams.on_token_batch(batch, 0.0, (memoryview(b"aaaabbbbcccc"),)))
    assert [frontend.ends(sid)[0].vector for sid in sids] == [b"bbbb", b"cccc", b"aaaa"]


@pytest.mark.parametrize("frames", [(), (b"",), (b"abc",), (b"abcd", b"abcd")])
def test_vectors_that_do_not_fit_their_frame_are_refused(frontend: Frontend, frames: tuple[bytes, ...]) -> None:
    sid = pooled(frontend)
    with pytest.raises(ValueError, match="prefill-0"):
        frontend.streams.on_token_batch(vector_batch(sid, b"abcd"), 0.0, frames)
    assert frontend.ends(sid) == []


def test_a_lost_vector_is_asked_for_again(frontend: Frontend) -> None:
    """Nothing that was accepted implies that the stream is complete, although it wants no tokens."""
    sid = pooled(frontend)
    frontend.message(Retry(sid, 1, "prefill-0 died"))
    assert sent(frontend.said, Submit)[-1].attempt == 2
    frontend.do(frontend.streams.on_token_batch(vector_batch(sid, b"old!"), 0.0, (b"old!",)))
    assert frontend.ends(sid) == []
    frontend.do(frontend.streams.on_token_batch(vector_batch(sid, b"new!", attempt=2, seq=2), 0.0, (b"new!",)))
    assert [end.vector for end in frontend.ends(sid)] == [b"new!"]


def test_a_new_scheduler_is_told_the_log_levels_that_the_last_one_had_set(frontend: Frontend) -> None:
    frontend.message(ClusterStatus(1, True, "", (), "debug", "error"))
    (hello,) = sent(frontend.message(WhoAreYou(epoch=2)), FrontendHello)
    assert (hello.log_level, hello.scheduler_log_level) == ("debug", "error")


def test_of_thousands_of_worker_incarnations_those_heard_last_are_remembered(frontend: Frontend) -> None:
    sid = frontend.submit()
    frontend.row(sid, 0, [10])
    for incarnation in range(WORKER_MEMORY + 1):
        frontend.beat(("decode-1", incarnation), 0)
        frontend.beat(DECODE, 1)
        if incarnation == 0:
            frontend.row(sid, 1, [11], worker=PREFILL)
    assert sent(frontend.sleep(LIMITS.suspicion_s + 1.0), Submit) == []
    frontend.beat(DECODE, 1)  # heard all the time
    assert sent(frontend.sleep(LIMITS.suspicion_s + 1.0), Submit) == []
    frontend.beat(PREFILL, 1)  # forgotten: what came before may have been lost, or not
    assert sent(frontend.sleep(LIMITS.suspicion_s + 1.0), Submit)[0].attempt == 2
