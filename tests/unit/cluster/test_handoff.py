"""From the prefill worker's report to the decode worker's command, and what happens when a leg fails."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from baton.proto.lifecycle import Outcome
from baton.proto.messages import (
    CancelCommand,
    Close,
    CloseAck,
    Ended,
    FirstRows,
    Ledger,
    Load,
    Message,
    PrefillDone,
    Progress,
    Refused,
    Retry,
    StartDecode,
    StartPrefill,
)
from baton.scheduler_proc.metrics import Metrics

Bench = Any
ROWS = FirstRows((42,))


@pytest.fixture
def split(bench: Bench) -> Bench:
    """1 prefill + 2 decode workers and a frontend."""
    bench.frontend_id = bench.frontend()
    bench.prefill = bench.worker("prefill-0")
    bench.decode = [bench.worker("decode-0"), bench.worker("decode-1")]
    return bench


def prefilled(bench: Bench, n: int = 1, tokens: int = 64) -> tuple[int, int]:
    sid = bench.submit(n, tokens=tokens)
    bench.tell(bench.prefill, PrefillDone(sid, 1, 5, tokens, (0, 1, 2, 3), ROWS))
    return sid


def close(sid: tuple[int, int], attempt: int = 1) -> Close:
    return Close(sid, attempt, Outcome.STOP, 64, 3, Ledger())


def test_prefill_done_binds_the_decode_worker(split: Bench) -> None:
    sid = prefilled(split)
    [start] = split.sent(StartDecode)
    assert (start.sid, start.lease, start.owner.worker, start.first_rows) == (sid, 5, "prefill-0", ROWS)
    assert start.reported_at == split.now
    assert start.cmd_seq > split.sent(StartPrefill)[0].cmd_seq


def test_the_decode_worker_with_room_and_fewer_streams_is_chosen(split: Bench, idle: Load) -> None:
    split.tell(split.decode[0], msgspec.structs.replace(idle, free_blocks=2, used_blocks=98))
    split.tell(split.decode[1], msgspec.structs.replace(idle, free_blocks=50, running=3))
    prefilled(split)
    assert split.recipients(StartDecode) == ["decode-1"]


def test_a_long_prompt_is_bound_when_half_of_it_has_settled(split: Bench) -> None:
    sid = split.submit(1, tokens=1024)
    split.tell(split.prefill, Progress(sid, 1, 5, 256, 1024, tuple(range(16)), tokens_per_s=100))
    assert not split.sent(StartDecode)
    split.tell(split.prefill, Progress(sid, 1, 5, 512, 1024, tuple(range(32)), tokens_per_s=100))
    [start] = split.sent(StartDecode)
    assert (start.num_tokens, start.first_rows, start.reported_at) == (512, None, 0.0)
    split.tell(split.prefill, PrefillDone(sid, 1, 5, 1024, tuple(range(64)), ROWS))
    assert not split.sent(StartDecode)


def test_a_long_prompt_is_bound_when_the_rest_takes_less_than_a_second(split: Bench) -> None:
    sid = split.submit(1, tokens=1024)
    split.tell(split.prefill, Progress(sid, 1, 5, 256, 1024, tuple(range(16)), tokens_per_s=10_000))
    assert len(split.sent(StartDecode)) == 1


def test_without_a_decode_worker_of_the_same_layout_nothing_is_prefilled(bench: Bench) -> None:
    bench.frontend()
    bench.worker("prefill-0", groups=1)
    bench.worker("decode-0", groups=2)
    bench.submit(1)
    assert not bench.sent(StartPrefill)
    bench.worker("decode-1", groups=1)
    assert len(bench.sent(StartPrefill)) == 1


def test_a_handoff_waits_for_a_decode_worker_with_room_for_it(make_bench: Callable[..., Bench]) -> None:
    """While not all have been there: nobody stands in yet."""
    bench = make_bench(expected_workers=4)
    bench.frontend()
    prefill, decode = bench.worker("prefill-0"), bench.worker("decode-0")
    sid = bench.submit(1)
    bench.worker("decode-1", num_blocks=2)
    bench.instructions += bench.cluster.peer_lost(decode, "its process has died", bench.now)
    bench.tell(prefill, PrefillDone(sid, 1, 5, 64, (0, 1, 2, 3), ROWS))
    assert not bench.sent(StartDecode)
    bench.worker("decode-0", incarnation=2)
    bench.wait(0.5)
    assert len(bench.sent(StartDecode)) == 1


def test_a_refused_decode_leg_goes_to_the_next_worker_under_the_same_attempt(split: Bench) -> None:
    sid = prefilled(split)
    [first] = split.recipients(StartDecode)
    split.tell(f"{first}:1".encode(), Refused(sid, 1, "decode", "no"))
    [second] = split.recipients(StartDecode)
    assert {first, second} == {"decode-0", "decode-1"}
    split.tell(f"{second}:1".encode(), Refused(sid, 1, "decode", "no either"))
    assert split.sent(Retry) == [Retry(sid, 1, "no; no either")]


def test_a_refused_prefill_leg_goes_to_another_worker(bench: Bench) -> None:
    bench.frontend()
    workers = [bench.worker("unified-0"), bench.worker("unified-1")]
    sid = bench.submit(1)
    [first] = bench.recipients(StartPrefill)
    bench.tell(f"{first}:1".encode(), Refused(sid, 1, "prefill", "no"))
    [second] = bench.recipients(StartPrefill)
    assert {first, second} == {"unified-0", "unified-1"}
    assert len(workers) == 2


def test_an_attempt_that_a_worker_gave_up_is_retried_and_cancelled_elsewhere(split: Bench) -> None:
    sid = prefilled(split)
    [decode] = split.recipients(StartDecode)
    split.tell(f"{decode}:1".encode(), Ended(sid, 1, "decode", "the lease on its KV is gone"))
    assert split.sent(Retry) == [Retry(sid, 1, "the lease on its KV is gone")]
    assert split.recipients(CancelCommand) == ["prefill-0"]


def test_a_retry_is_repeated_until_the_frontend_answers(split: Bench) -> None:
    sid = prefilled(split)
    split.tell(split.prefill, Ended(sid, 1, "prefill", "the lease on its KV expired"))
    split.sent(Retry)
    split.wait(2.5, split.frontend_id)
    assert len(split.sent(Retry)) == 2
    split.submit(1, attempt=2)
    split.wait(2.5, split.frontend_id)
    assert not split.sent(Retry)


def retries(split: Bench) -> float:
    """baton_retries_total, of everything observed so far."""
    metrics = Metrics()
    for event in split.observed(Message):
        metrics.observe(event)
    (line,) = [line for line in metrics.text().splitlines() if line.startswith("baton_retries_total ")]
    return float(line.split()[-1])


def test_an_attempt_counts_as_one_retry_whoever_ended_the_one_before(split: Bench) -> None:
    sid = prefilled(split)
    assert retries(split) == 0
    split.submit(1, attempt=2)  # the frontend has lost rows
    split.submit(1, attempt=2)  # and hears of no answer
    assert retries(split) == 1
    split.tell(split.prefill, Ended(sid, 2, "prefill", "the lease on its KV expired"))
    assert len(split.sent(Retry)) == 1
    split.submit(1, attempt=3)
    assert retries(split) == 2


def test_the_loss_of_a_prefill_worker_that_has_handed_over_does_not_matter(split: Bench) -> None:
    sid = prefilled(split)
    split.tell(split.prefill, Ended(sid, 1, "prefill"))
    split.instructions += split.cluster.peer_lost(split.prefill, "its process has died", split.now)
    assert not split.sent(Retry)


def test_the_loss_of_a_prefill_worker_before_that_is_a_retry(split: Bench) -> None:
    sid = prefilled(split)
    split.instructions += split.cluster.peer_lost(split.prefill, "its process has died", split.now)
    assert split.sent(Retry) == [Retry(sid, 1, "prefill-0: its process has died")]
    assert len(split.sent(CancelCommand)) == 1


def test_close_frees_every_leg_and_is_acknowledged_each_time(split: Bench) -> None:
    sid = prefilled(split)
    split.tell(split.frontend_id, close(sid))
    assert sorted(split.recipients(CancelCommand)) == ["decode-0", "prefill-0"]
    split.tell(split.frontend_id, close(sid))
    assert split.sent(CloseAck) == [CloseAck(sid), CloseAck(sid)]
    assert len(split.observed(Close)) == 1


def test_a_closed_stream_is_not_revived_by_a_late_submit(split: Bench) -> None:
    sid = prefilled(split)
    split.tell(split.frontend_id, close(sid))
    split.sent(StartPrefill)
    split.submit(1)
    assert not split.sent(StartPrefill)


def test_close_of_an_unknown_stream_is_acknowledged_and_counted(split: Bench) -> None:
    split.tell(split.frontend_id, close((7, 99)))
    assert split.sent(CloseAck) == [CloseAck((7, 99))]
    assert len(split.observed(Close)) == 1


def test_a_stream_that_ended_at_the_worker_but_is_never_closed_is_retried(split: Bench) -> None:
    sid = split.submit(1)
    split.tell(split.prefill, Ended(sid, 1, "prefill"))
    split.wait(split.config.reconcile_after_s + 0.5)
    assert [retry.sid for retry in split.sent(Retry)] == [sid]


def test_reports_of_another_attempt_are_ignored(split: Bench) -> None:
    sid = split.submit(1)
    split.tell(split.prefill, PrefillDone(sid, 2, 5, 64, (0, 1, 2, 3), ROWS))
    split.tell(split.prefill, Ended(sid, 2, "prefill", "gone"))
    assert not split.sent(StartDecode)
    assert not split.sent(Retry)


def test_samples_of_one_prompt_go_the_same_way(bench: Bench) -> None:
    """However much the others are idle, and although the prompt alone fills the worker's backlog."""
    bench.frontend()
    prefills = [bench.worker("prefill-0"), bench.worker("prefill-1")]
    for name in ("decode-0", "decode-1"):
        bench.worker(name)
    sids = [bench.submit(1, tokens=1200), *(bench.submit(n, tokens=1200, sibling=1) for n in (2, 3))]
    assert bench.recipients(StartPrefill) == ["prefill-0"] * 3
    for lease, sid in enumerate(sids):
        bench.tell(prefills[0], PrefillDone(sid, 1, lease, 1200, tuple(range(75)), ROWS))
    assert len(set(bench.recipients(StartDecode))) == 1
    bench.submit(4, tokens=64)
    assert bench.recipients(StartPrefill) == ["prefill-1"]


def test_a_sample_whose_sibling_is_over_goes_wherever_there_is_room(bench: Bench) -> None:
    frontend = bench.frontend()
    bench.worker("prefill-0")
    bench.worker("decode-0")
    sid = bench.submit(1)
    bench.tell(frontend, close(sid))
    bench.submit(2, sibling=1)
    assert bench.recipients(StartPrefill) == ["prefill-0"] * 2


def test_samples_that_share_nothing_are_spread_and_counted_in_full(bench: Bench) -> None:
    """Where blocks are swapped each has its own."""
    bench.frontend()
    prefills = [bench.worker(f"prefill-{n}", shared_pool="pool") for n in (0, 1)]
    for name in ("decode-0", "decode-1"):
        bench.worker(name, shared_pool="pool")
    sids = [bench.submit(1, tokens=1200), bench.submit(2, tokens=1200, sibling=1)]
    assert bench.recipients(StartPrefill) == ["prefill-0", "prefill-1"]
    for prefill, sid in zip(prefills, sids, strict=True):
        bench.tell(prefill, PrefillDone(sid, 1, 1, 1200, tuple(range(75)), ROWS))
    assert sorted(bench.recipients(StartDecode)) == ["decode-0", "decode-1"]


def test_samples_that_each_compute_the_whole_prompt_are_spread(bench: Bench) -> None:
    bench.frontend()
    for name in ("prefill-0", "prefill-1", "decode-0"):
        bench.worker(name)
    bench.submit(1, tokens=1200, prompt_logprobs=0)
    bench.submit(2, tokens=1200, sibling=1, prompt_logprobs=0)
    assert bench.recipients(StartPrefill) == ["prefill-0", "prefill-1"]
