"""Who is a member, who is lost, and what peers are told."""

from collections.abc import Callable
from typing import Any

from baton.proto.channels import identity
from baton.proto.messages import (
    Accepted,
    Beat,
    CancelCommand,
    ClusterStatus,
    Fenced,
    Goodbye,
    Load,
    NotAdmitted,
    Retry,
    StartPrefill,
    Welcome,
    WhoAreYou,
)
from baton.scheduler_proc.instructions import Log, Unwatch, Watch

Bench = Any


def test_a_worker_is_welcomed_with_the_epoch_and_watched(bench: Bench) -> None:
    worker = bench.worker("unified-0")
    assert bench.sent(Welcome, worker) == [Welcome(1)]
    assert Watch(worker, 12, "here") in bench.instructions


def test_a_worker_that_obeyed_a_scheduler_of_a_later_time_is_commanded_with_a_higher_epoch(bench: Bench) -> None:
    bench.frontend()
    other = bench.worker("unified-0")
    worker = bench.worker("unified-1", epoch=9)
    assert bench.sent(Welcome, worker) == [Welcome(10)]
    for n in (1, 2):
        bench.submit(n)
    assert [command.epoch for to in (other, worker) for command in bench.sent(StartPrefill, to)] == [10, 10]


def test_whoever_is_unknown_is_asked_once_in_a_while(bench: Bench, idle: Load) -> None:
    stranger = identity("unified-0", 3)
    for _ in range(3):
        bench.tell(stranger, idle)
    assert len(bench.sent(WhoAreYou, stranger)) == 1


def test_a_beat_of_an_unknown_process_is_answered_on_its_main_socket(bench: Bench) -> None:
    bench.tell(identity("unified-0", 3) + b":beat", Beat("unified-0", 3))
    assert len(bench.sent(WhoAreYou, identity("unified-0", 3))) == 1


def test_frontends_hear_of_readiness_and_of_what_is_missing(bench: Bench) -> None:
    bench.frontend()
    assert bench.sent(ClusterStatus)[-1].reason == "waiting for workers"
    bench.worker("prefill-0")
    assert bench.sent(ClusterStatus)[-1].reason == "waiting for a decode worker beside prefill-0"
    bench.worker("decode-0")
    assert bench.sent(ClusterStatus)[-1].ready


def test_expected_workers_delay_the_first_readiness_only(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(expected_workers=2)
    bench.frontend()
    bench.worker("unified-0")
    assert bench.sent(ClusterStatus)[-1].reason == "1 of 2 workers are there"
    other = bench.worker("unified-1")
    assert bench.sent(ClusterStatus)[-1].ready
    bench.instructions += bench.cluster.peer_lost(other, "its process has died", bench.now)
    assert bench.sent(ClusterStatus)[-1].ready


def test_unequal_layouts_are_named_once_and_make_no_path(bench: Bench) -> None:
    bench.frontend()
    bench.worker("prefill-0", groups=1)
    bench.worker("decode-0", groups=2)
    assert "KV groups" in bench.sent(ClusterStatus)[-1].reason
    errors = [i.text for i in bench.instructions if isinstance(i, Log) and "can't exchange KV" in i.text]
    assert errors == ["decode-0 and prefill-0 can't exchange KV: 2 KV groups against 1"]


def test_workers_on_two_hosts_need_a_way_for_kv_between_them(bench: Bench) -> None:
    bench.frontend()
    bench.worker("prefill-0", kv_endpoint="unix:/kv")
    bench.worker("decode-9", kv_endpoint="unix:/kv tcp://10.0.0.5:2", distant=True)
    why = "decode-9 is on another host than prefill-0, whose --kv-transfer works within one alone"
    assert why in bench.sent(ClusterStatus)[-1].reason
    bench.worker("prefill-1", kv_endpoint="unix:/kv tcp://10.0.0.4:2")
    assert bench.sent(ClusterStatus)[-1].ready


def test_another_protocol_version_is_refused(bench: Bench) -> None:
    bench.worker("unified-0", protocol=99)
    assert not bench.cluster.registry.workers
    assert any("speaks protocol 99" in i.text for i in bench.instructions if isinstance(i, Log))


def test_a_worker_without_beats_is_lost_fenced_and_its_streams_are_retried(bench: Bench, idle: Load) -> None:
    frontend = bench.frontend()
    worker = bench.worker("unified-0")
    sid = bench.submit(1)
    bench.wait(bench.config.heartbeat_timeout_s + 1, frontend)
    assert [retry.sid for retry in bench.sent(Retry)][:1] == [sid]
    assert bench.sent(Fenced, worker)
    bench.tell(worker, idle)
    assert bench.sent(Fenced, worker)[0].incarnation == 1


def test_beats_alone_keep_a_worker(bench: Bench) -> None:
    bench.worker("unified-0")
    for _ in range(60):
        bench.tell(b"unified-0:1:beat", Beat("unified-0", 1))
        bench.wait(0.5)
    assert bench.cluster.registry.workers


def test_a_stuck_step_is_a_loss(bench: Bench) -> None:
    worker = bench.worker("unified-0")
    bench.tell(b"", Beat("unified-0", 1, step=3, step_running_s=29, expected_s=0.1))
    assert not bench.sent(Fenced)
    bench.tell(b"", Beat("unified-0", 1, step=3, step_running_s=31, expected_s=0.1))
    assert "step 3" in bench.sent(Fenced, worker)[0].reason


def test_a_long_step_that_was_expected_is_none(bench: Bench) -> None:
    bench.worker("unified-0")
    bench.tell(b"", Beat("unified-0", 1, step=3, step_running_s=100, expected_s=20))
    assert not bench.sent(Fenced)


def test_a_new_incarnation_ends_the_one_before(bench: Bench) -> None:
    bench.frontend()
    old = bench.worker("unified-0", incarnation=1)
    sid = bench.submit(1)
    bench.sent(StartPrefill)
    new = bench.worker("unified-0", incarnation=2)
    assert bench.sent(Fenced, old)
    assert bench.sent(Retry)[0].sid == sid
    assert Unwatch(old) in bench.instructions
    bench.submit(1, attempt=2)
    assert bench.sent(StartPrefill, new)


def test_a_worker_with_another_model_is_refused_for_good(bench: Bench) -> None:
    bench.frontend()
    bench.worker("unified-0")
    other = bench.worker("unified-1", fingerprint="another")
    (refusal,) = bench.sent(NotAdmitted, other)
    assert refusal.final
    assert "another model than unified-0" in refusal.reason
    assert not bench.sent(Welcome, other)
    assert [worker.name for worker in bench.cluster.registry.workers.values()] == ["unified-0"]


def test_of_two_workers_of_one_name_the_first_stays_while_it_lives(bench: Bench) -> None:
    frontend, first = bench.frontend(), bench.worker("unified-0")
    second = bench.worker("unified-0", incarnation=2, pid=13)
    (refusal,) = bench.sent(NotAdmitted, second)
    assert not refusal.final
    assert "give another --name" in refusal.reason
    assert not bench.sent(Fenced)
    bench.wait(2, frontend)
    bench.worker("unified-0", incarnation=2, pid=13)
    assert bench.sent(Fenced, first)
    assert bench.sent(Welcome, second)


def test_who_was_turned_away_for_its_name_is_asked_again_when_the_other_has_gone(bench: Bench) -> None:
    first = bench.worker("unified-0")
    second = bench.worker("unified-0", incarnation=2, pid=13)
    assert not bench.sent(WhoAreYou, second)
    bench.instructions += bench.cluster.peer_lost(first, "its process has died", bench.now)
    assert bench.sent(WhoAreYou, second)
    bench.worker("unified-0", incarnation=2, pid=13)
    assert bench.sent(Welcome, second)


def test_a_goodbye_is_not_answered_but_its_streams_move(bench: Bench, idle: Load) -> None:
    bench.frontend()
    worker = bench.worker("unified-0")
    bench.submit(1)
    bench.tell(worker, Goodbye("unified-0", 1))
    assert bench.sent(Retry)
    bench.tell(worker, idle)
    assert not bench.sent(Fenced)


def test_a_lost_frontend_takes_its_streams_with_it(bench: Bench) -> None:
    frontend = bench.frontend()
    bench.worker("unified-0")
    sid = bench.submit(1)
    bench.instructions += bench.cluster.peer_lost(frontend, "its process has died", bench.now)
    assert [cancel.sid for cancel in bench.sent(CancelCommand)] == [sid]
    assert bench.cluster.idle


def test_a_scheduler_that_stood_still_blames_nobody(bench: Bench) -> None:
    bench.worker("unified-0")
    bench.wait(1)
    bench.now += 60
    bench.instructions += bench.cluster.tick(bench.now)
    assert bench.cluster.registry.workers


def test_a_message_that_its_sender_must_not_send_is_ignored(bench: Bench) -> None:
    bench.tell(bench.worker("unified-0"), Goodbye("nobody", 1))
    bench.tell(bench.frontend(), Load(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0))
    assert any("must not send Load" in i.text for i in bench.instructions if isinstance(i, Log))
    bench.submit(1)
    assert bench.sent(Accepted)
