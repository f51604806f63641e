"""Nobody is left for a role: another worker takes streams from prompt to end until somebody is."""

from collections.abc import Callable
from typing import Any

import pytest

from baton.proto.channels import identity
from baton.proto.lifecycle import Role
from baton.proto.messages import (
    Claim,
    ClusterStatus,
    FirstRows,
    Goodbye,
    Holding,
    PrefillDone,
    Rejected,
    Retry,
    StartDecode,
    StartPrefill,
)
from baton.scheduler_proc.instructions import Log

Bench = Any
ROWS = FirstRows((42,))


@pytest.fixture
def pair(bench: Bench) -> Bench:
    """One of each role."""
    bench.frontend()
    bench.worker("prefill-0")
    bench.worker("decode-0")
    return bench


def die(bench: Bench, name: str) -> None:
    bench.instructions += bench.cluster.peer_lost(identity(name, 1), "its process has died", bench.now)


def logged(bench: Bench) -> list[str]:
    return [i.text for i in bench.instructions if isinstance(i, Log)]


@pytest.mark.parametrize(("gone", "left"), [("decode-0", "prefill-0"), ("prefill-0", "decode-0")])
def test_the_worker_that_is_left_does_both(pair: Bench, gone: str, left: str) -> None:
    die(pair, gone)
    pair.submit(1)
    (start,) = pair.sent(StartPrefill, identity(left, 1))
    assert start.continue_decode
    assert [text for text in logged(pair) if f"{left} does both" in text]
    assert pair.sent(ClusterStatus)[-1].ready


def test_streams_are_handed_over_again_once_somebody_is_there(pair: Bench) -> None:
    die(pair, "decode-0")
    pair.worker("decode-0", incarnation=2)
    sid = pair.submit(1)
    assert [start.continue_decode for start in pair.sent(StartPrefill)] == [False]
    pair.tell(identity("prefill-0", 1), PrefillDone(sid, 1, 5, 64, (0, 1, 2, 3), ROWS))
    assert pair.recipients(StartDecode) == ["decode-0"]
    assert logged(pair)[-1] == "every role has a worker again"


def test_a_cluster_that_ends_says_nothing_of_it(pair: Bench) -> None:
    for name, incarnation in (("frontend-0", 7), ("decode-0", 1), ("prefill-0", 1)):
        pair.tell(identity(name, incarnation), Goodbye(name, incarnation))
    assert not [text for text in logged(pair) if "does both" in text or "again" in text]


def test_a_prompt_that_nobody_is_left_for_starts_again_where_it_was(pair: Bench) -> None:
    sid = pair.submit(1)
    assert [start.continue_decode for start in pair.sent(StartPrefill)] == [False]
    die(pair, "decode-0")
    pair.tell(identity("prefill-0", 1), PrefillDone(sid, 1, 5, 64, (0, 1, 2, 3), ROWS))
    assert [retry.reason for retry in pair.sent(Retry)] == ["nobody is left to take it over from prefill-0"]
    pair.submit(1, attempt=2)
    assert [start.continue_decode for start in pair.sent(StartPrefill)] == [True]


def test_nobody_stands_in_before_all_have_been_there(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(expected_workers=2)
    bench.frontend()
    bench.worker("prefill-0")
    bench.submit(1)
    assert bench.sent(StartPrefill) == []
    assert not bench.sent(ClusterStatus)[-1].ready
    bench.worker("decode-0")
    assert len(bench.sent(StartPrefill)) == 1


def test_a_drained_worker_is_stood_in_for_and_never_stands_in(pair: Bench) -> None:
    pair.cluster.operator.drain("decode-0", True, pair.now)
    pair.submit(1)
    assert pair.recipients(StartPrefill) == ["prefill-0"]
    pair.cluster.operator.drain("prefill-0", False, pair.now)
    pair.submit(2)
    assert pair.sent(StartPrefill) == []


def test_who_stands_in_has_room_for_so_many_streams_as_it_decodes(pair: Bench) -> None:
    die(pair, "decode-0")
    for n in range(12):
        pair.submit(n, tokens=1)
    assert len(pair.sent(StartPrefill)) == 8  # max_num_seqs


def test_a_prompt_too_long_for_the_stand_in_waits_for_the_role_and_holds_up_nobody(bench: Bench) -> None:
    bench.frontend()
    bench.worker("prefill-0", num_blocks=8)
    bench.worker("prefill-1", num_blocks=100)
    bench.worker("decode-0")
    die(bench, "decode-0")
    die(bench, "prefill-1")
    bench.submit(1, tokens=400)
    bench.submit(2, tokens=64)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [2]
    assert bench.sent(Retry) == []
    assert bench.sent(Rejected) == []
    bench.worker("decode-0", incarnation=2)
    bench.worker("prefill-1", incarnation=2)
    bench.wait(1)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [1]


@pytest.mark.parametrize(("small", "large"), [("prefill-0", "decode-0"), ("decode-0", "prefill-0")])
def test_what_only_one_of_a_pair_can_hold_stays_there(bench: Bench, small: str, large: str) -> None:
    """New or begun: a stream that grows on a decode worker may come back longer than any prefill worker holds."""
    bench.frontend()
    bench.worker(small, num_blocks=8)
    bench.worker(large)
    bench.submit(1, tokens=400)
    bench.submit(2, attempt=2, tokens=400, output=300)
    starts = bench.sent(StartPrefill, identity(large, 1))
    assert [(start.sid[1], start.continue_decode) for start in starts] == [(1, True), (2, True)]
    bench.submit(3)
    assert [start.continue_decode for start in bench.sent(StartPrefill, identity("prefill-0", 1))] == [False]


def test_what_those_who_are_left_can_not_take_over_starts_again_at_once(bench: Bench) -> None:
    bench.frontend()
    bench.worker("prefill-0")
    bench.worker("decode-0")
    bench.worker("decode-1", num_blocks=8)
    sid = bench.submit(1, tokens=400)
    assert [start.continue_decode for start in bench.sent(StartPrefill)] == [False]
    die(bench, "decode-0")
    bench.tell(identity("prefill-0", 1), PrefillDone(sid, 1, 5, 400, tuple(range(25)), ROWS))
    assert [retry.reason for retry in bench.sent(Retry)] == ["nobody is left to take it over from prefill-0"]
    bench.submit(1, attempt=2, tokens=400)
    assert [start.continue_decode for start in bench.sent(StartPrefill)] == [True]


def test_one_that_has_come_to_the_end_of_every_context_is_told_so_by_a_worker(bench: Bench) -> None:
    peers = bench.frontend(), bench.worker("prefill-0", num_blocks=8), bench.worker("decode-0", num_blocks=8)
    bench.wait(3, *peers)
    bench.submit(1, attempt=2, tokens=8 * 16, output=1)
    assert len(bench.sent(StartPrefill)) == 1
    bench.submit(2, tokens=8 * 16)
    bench.submit(3, attempt=2, tokens=8 * 16 + 1, output=9)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["too_long", "no_workers"]


def test_it_does_not_wait_for_ever(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(no_workers_s=5)
    frontend, prefill, decode = bench.frontend(), bench.worker("prefill-0", num_blocks=8), bench.worker("decode-0")
    bench.worker("prefill-1")
    bench.wait(1, frontend, prefill, decode)
    die(bench, "prefill-1")
    die(bench, "decode-0")
    bench.submit(1, tokens=400)
    bench.wait(7, frontend, prefill)
    assert "waiting for a decode worker" in bench.sent(Retry)[0].reason
    bench.submit(1, attempt=2, tokens=400)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["no_workers"]
    bench.submit(2)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [2]


def test_one_that_crashes_again_and_again_before_it_could_stand_in_is_not_waited_for(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(no_workers_s=5, expected_workers=2)
    frontend = bench.frontend()
    bench.submit(1)
    for incarnation in (1, 2, 3):
        decode = bench.worker("decode-0", incarnation=incarnation)
        bench.wait(1, frontend, decode)
        bench.instructions += bench.cluster.peer_lost(decode, "its process has died", bench.now)
        bench.wait(1, frontend)
    assert "waiting for a prefill worker" in bench.sent(Retry)[0].reason


def test_a_stand_in_that_was_lost_is_waited_for_as_long_as_others(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(no_workers_s=5)
    frontend, prefill = bench.frontend(), bench.worker("prefill-0")
    bench.worker("decode-0")
    die(bench, "decode-0")
    bench.wait(60, frontend, prefill)
    die(bench, "prefill-0")
    bench.submit(1)
    bench.wait(4, frontend)
    assert bench.sent(Rejected) + bench.sent(Retry) == []
    prefill = bench.worker("prefill-0", incarnation=2)
    assert [start.continue_decode for start in bench.sent(StartPrefill)] == [True]
    bench.wait(60, frontend, prefill)
    bench.instructions += bench.cluster.peer_lost(prefill, "its process has died", bench.now)
    bench.wait(6, frontend)
    bench.submit(2)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["no_workers"]


def test_what_a_stand_in_decodes_goes_on_after_a_restart_of_the_scheduler(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(grace_s=2)
    frontend = bench.frontend(claims=(Claim((7, 1), 1, 64),))
    worker = bench.worker("prefill-0", holdings=(Holding((7, 1), 1, "decode"),))
    bench.wait(10, frontend, worker)
    assert bench.sent(Retry) == []
    assert [each.name for each in bench.cluster.operator.registry.workers.values() if each.streams] == ["prefill-0"]


def test_after_a_restart_of_the_scheduler_who_is_left_stands_in_once_others_had_the_time(
    make_bench: Callable[..., Bench],
) -> None:
    bench = make_bench(grace_s=2)
    frontend, worker = bench.frontend(), bench.worker("prefill-0")
    bench.submit(1)
    bench.wait(1, frontend, worker)
    assert bench.sent(StartPrefill) == []
    bench.wait(2, frontend, worker)
    assert [start.continue_decode for start in bench.sent(StartPrefill)] == [True]


def test_roles_that_are_there_keep_to_what_they_are(bench: Bench) -> None:
    bench.frontend()
    for name in ("prefill-0", "prefill-1", "decode-0"):
        bench.worker(name)
    die(bench, "prefill-0")
    bench.submit(1)
    assert bench.recipients(StartPrefill) == ["prefill-1"]
    assert bench.cluster.operator.registry.worker_named("prefill-1").role == Role.PREFILL
