"""Which streams are admitted, in which order they are placed, and where."""

from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from baton.proto.messages import Accepted, CancelCommand, Load, Rejected, Retry, StartPrefill

Bench = Any


def test_a_prompt_goes_to_a_prefill_worker_with_its_frames_and_the_frontends_address(bench: Bench) -> None:
    bench.frontend()
    prefill, _ = bench.worker("prefill-0"), bench.worker("decode-0")
    sid = bench.submit(1)
    assert bench.sent(Accepted) == [Accepted(sid, 1)]
    [start] = bench.sent(StartPrefill, prefill)
    assert (start.sid, start.attempt, start.reply_to, start.continue_decode) == (sid, 1, "tokens:frontend-0", False)


def test_a_unified_worker_is_told_to_go_on_decoding(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0")
    bench.submit(1)
    assert bench.sent(StartPrefill)[0].continue_decode


def test_a_repeated_submit_is_accepted_again_and_started_once(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0")
    bench.submit(1)
    bench.submit(1)
    assert len(bench.sent(Accepted)) == 2
    assert len(bench.sent(StartPrefill)) == 1


def test_prompts_wait_here_while_the_workers_backlog_is_full(bench: Bench, idle: Load) -> None:
    bench.frontend()
    worker = bench.worker("unified-0", max_num_batched_tokens=64)
    for n in range(6):
        bench.submit(n, tokens=64)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [0, 1, 2, 3]
    bench.tell(worker, msgspec.structs.replace(idle, last_cmd_seq=4, queued_tokens=192, running=1))
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [4]


def test_a_prompt_larger_than_the_backlog_bound_is_placed_on_an_idle_worker(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0", max_num_batched_tokens=16)
    bench.submit(1, tokens=1000)
    assert len(bench.sent(StartPrefill)) == 1


def test_lower_priority_values_go_first_then_first_come_first_served(bench: Bench) -> None:
    bench.frontend()
    bench.submit(1, priority=1)
    bench.submit(2)
    bench.submit(3)
    bench.worker("unified-0")
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [2, 3, 1]


def test_a_stream_that_goes_on_is_not_behind_those_that_came_later(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench()
    frontend = bench.frontend()
    worker = bench.worker("unified-0", max_num_seqs=1)
    bench.submit(1)
    bench.wait(1, frontend)
    for n in (2, 3):
        bench.submit(n)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [1]
    bench.instructions += bench.cluster.peer_lost(worker, "its process has died", bench.now)
    bench.submit(1, attempt=2)
    bench.worker("unified-0", incarnation=2, max_num_seqs=1)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [1]


def test_a_stream_that_began_waits_for_a_worker_that_can_hold_it(bench: Bench) -> None:
    peers = bench.frontend(), bench.worker("unified-0", num_blocks=4)
    bench.wait(3, *peers)
    bench.submit(1, attempt=2, tokens=400, output=9)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["no_workers"]
    bench.worker("unified-1")
    bench.submit(1, attempt=2, tokens=400, output=9)
    assert bench.recipients(StartPrefill) == ["unified-1"]


def test_streams_on_a_unified_worker_are_bounded_by_its_slots(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0", max_num_seqs=2)
    for n in range(3):
        bench.submit(n, tokens=8)
    assert len(bench.sent(StartPrefill)) == 2


def test_a_full_queue_rejects_new_streams_but_not_later_attempts(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(max_waiting=1)
    bench.frontend()
    bench.submit(1)
    bench.submit(2)
    [rejected] = bench.sent(Rejected)
    assert (rejected.sid[1], rejected.code) == (2, "queue_full")
    assert rejected.retry_after_s > 0
    bench.submit(3, attempt=2)
    assert not bench.sent(Rejected)


def test_a_prompt_that_no_worker_can_hold_is_rejected(bench: Bench) -> None:
    peers = bench.frontend(), bench.worker("unified-0", num_blocks=4)
    bench.wait(3, *peers)
    bench.submit(1, tokens=64)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["too_long"]


def test_a_prompt_that_only_a_lost_worker_could_hold_waits_for_it_and_holds_up_nobody(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(no_workers_s=10)
    peers = [bench.frontend(), bench.worker("unified-0", num_blocks=4), bench.worker("unified-1")]
    bench.wait(3, *peers)
    bench.instructions += bench.cluster.peer_lost(peers.pop(), "its process has died", bench.now)
    for n in (1, 2):
        bench.submit(n, tokens=400 if n == 1 else 16)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [2]
    bench.wait(5, *peers)
    assert bench.sent(Rejected) + bench.sent(Retry) == []
    peers.append(bench.worker("unified-1", incarnation=2))
    bench.wait(1, *peers)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [1]
    bench.instructions += bench.cluster.peer_lost(peers.pop(), "its process has died", bench.now)
    bench.wait(11, *peers)
    bench.submit(3, tokens=400)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["too_long"]


def test_a_prompt_that_only_a_worker_which_never_came_could_hold_does_not_wait_for_ever(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(no_workers_s=5, expected_workers=2)
    peers = bench.frontend(), bench.worker("unified-0", num_blocks=4)
    bench.submit(1, tokens=400)
    bench.wait(4, *peers)
    assert bench.sent(Retry) == []
    bench.wait(2, *peers)
    assert "more than any worker holds" in bench.sent(Retry)[0].reason
    bench.submit(1, attempt=2, tokens=400)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["no_workers"]
    bench.worker("unified-1")
    bench.submit(1, attempt=2, tokens=400)
    assert bench.recipients(StartPrefill) == ["unified-1"]


def test_a_prompt_goes_to_the_worker_that_can_hold_it(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0", num_blocks=4)
    bench.worker("unified-1", num_blocks=40)
    bench.submit(1, tokens=64)
    assert bench.recipients(StartPrefill) == ["unified-1"]


def test_a_stream_goes_where_it_can_be_held_to_its_end(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0", num_blocks=4)
    bench.worker("unified-1", num_blocks=100)
    for n in range(4):
        bench.submit(n, tokens=60)  # and 16 of output
    assert set(bench.recipients(StartPrefill)) == {"unified-1"}


def test_without_workers_a_stream_waits_then_goes_back_and_new_ones_are_rejected(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(no_workers_s=5)
    frontend = bench.frontend()
    bench.submit(1)
    assert bench.sent(Accepted)
    bench.wait(4.5, frontend)
    assert not bench.sent(Retry)
    bench.wait(1, frontend)
    assert "waiting for workers" in bench.sent(Retry)[0].reason
    bench.submit(1, attempt=2)
    assert bench.sent(Rejected)[0].code == "no_workers"


def test_the_time_without_workers_counts_from_their_loss(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(no_workers_s=5)
    frontend, worker = bench.frontend(), bench.worker("unified-0")
    bench.wait(60, frontend, worker)
    bench.instructions += bench.cluster.peer_lost(worker, "its process has died", bench.now)
    bench.submit(1)
    assert not bench.sent(Rejected)
    bench.worker("unified-0", incarnation=2)
    assert bench.sent(StartPrefill)


def test_a_stream_whose_deadline_passed_in_the_queue_is_rejected(bench: Bench) -> None:
    bench.frontend()
    bench.submit(1, timeout_s=1)
    bench.wait(2)
    bench.worker("unified-0")
    assert bench.sent(Rejected)[0].code == "deadline"
    assert not bench.sent(StartPrefill)


def test_a_higher_attempt_replaces_the_one_that_runs(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0")
    sid = bench.submit(1)
    bench.submit(1, attempt=2)
    [cancel] = bench.sent(CancelCommand)
    assert (cancel.sid, cancel.attempt) == (sid, 1)
    assert [start.attempt for start in bench.sent(StartPrefill)] == [1, 2]


def test_a_lower_attempt_is_ignored(bench: Bench) -> None:
    bench.frontend()
    bench.submit(1, attempt=2)
    bench.sent(Accepted)
    bench.submit(1, attempt=1)
    assert not bench.sent(Accepted)


def test_least_loaded_counts_what_was_promised_since_the_last_report(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0")
    bench.worker("unified-1")
    for n in range(4):
        bench.submit(n)
    assert sorted(bench.recipients(StartPrefill)) == ["unified-0", "unified-0", "unified-1", "unified-1"]


def test_round_robin_goes_by_name(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench("round_robin")
    bench.frontend()
    for name in ("unified-2", "unified-0", "unified-1"):
        bench.worker(name)
    for n in range(4):
        bench.submit(n, tokens=8)
    assert bench.recipients(StartPrefill) == ["unified-0", "unified-1", "unified-2", "unified-0"]


def test_an_unknown_policy_is_an_error(make_bench: Callable[..., Bench]) -> None:
    with pytest.raises(ValueError, match="least_loaded"):
        make_bench("random")
