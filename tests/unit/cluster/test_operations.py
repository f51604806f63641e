"""What operators ask of the cluster: drained workers, roles, cancelled requests, emptied caches, log levels."""

from collections.abc import Callable

import msgspec
import pytest

from baton.proto.channels import identity
from baton.proto.lifecycle import Duty
from baton.proto.messages import (
    Accepted,
    CancelCommand,
    Cancelled,
    Close,
    CloseAck,
    ClusterStatus,
    Configure,
    Ended,
    FirstRows,
    FirstToken,
    Goodbye,
    KVLink,
    Ledger,
    Load,
    Message,
    PrefillDone,
    Rejected,
    Retry,
    Settings,
    StartDecode,
    StartPrefill,
)
from baton.scheduler_proc.instructions import EventKind, Happened, Observe, SetLogLevel, WorkerJoined, WorkerLeft
from baton.scheduler_proc.operations import RefusedError, Why
from baton.scheduler_proc.orders import ABSENT_MEMORY


def happened(bench) -> list[EventKind]:
    return [i.kind for i in bench.instructions if isinstance(i, Happened)]


def act(bench) -> None:
    """The turn of the loop in which an operator's wish takes effect."""
    bench.instructions += bench.cluster.tick(bench.now)


def refused(why: Why, ask: Callable[[], object]) -> str:
    with pytest.raises(RefusedError) as caught:
        ask()
    assert caught.value.why is why
    return str(caught.value)


def settings_sent(bench, to: bytes) -> list[Settings]:
    return [message.settings for message in bench.sent(Configure, to)]


@pytest.fixture
def split(bench):
    """A frontend, a prefill worker and two decode workers; a stream that has been handed over to decode-0."""
    bench.frontend()
    for name in ("prefill-0", "decode-0", "decode-1"):
        bench.worker(name)
    return bench


def test_how_workers_read_kv_is_known_and_a_change_of_it_is_an_event(split, idle: Load) -> None:
    decode = identity("decode-0", 1)
    slow = KVLink("prefill-0", "tcp", "shm can't be used: prefill-0 is on another host")
    none = KVLink("prefill-1", "", "prefill-1 does not answer")
    for _ in range(2):
        split.tell(decode, msgspec.structs.replace(idle, links=(slow, none)))
    split.tell(decode, idle)  # a light report says nothing about them
    assert split.cluster.operator.links("") == [("decode-0", slow), ("decode-0", none)]
    assert split.cluster.operator.links("decode-1") == []
    refused(Why.NOT_FOUND, lambda: split.cluster.operator.links("nobody"))
    told = [i.text for i in split.instructions if isinstance(i, Happened) and i.kind is EventKind.LINK_CHANGED]
    assert told == [
        "reads prefill-0 through tcp (shm can't be used: prefill-0 is on another host)",
        "can't read prefill-1: prefill-1 does not answer",
    ]


def hand_over(bench, n: int) -> str:
    """Run a stream up to its decode leg; the worker that has it."""
    sid = bench.submit(n)
    bench.tell(identity("prefill-0", 1), PrefillDone(sid, 1, n, 64, (0, 1, 2, 3), FirstRows((5,))))
    (name,) = bench.recipients(StartDecode)
    bench.tell(identity("prefill-0", 1), Ended(sid, 1, "prefill"))
    return name


def test_a_draining_worker_gets_no_new_stream_and_keeps_those_it_has(split) -> None:
    busy = hand_over(split, 1)
    split.cluster.operator.drain(busy, False, split.now)
    act(split)
    assert settings_sent(split, identity(busy, 1)) == [Settings(role="decode", duty=Duty.DRAINING)]
    assert {hand_over(split, n) for n in range(2, 6)} == {"decode-0", "decode-1"} - {busy}
    assert split.sent(CancelCommand) == []
    assert split.sent(Retry) == []


def test_a_draining_prefill_worker_hands_over_what_it_has_begun(split) -> None:
    split.worker("prefill-1")
    sid = split.submit(1)
    (busy,) = split.recipients(StartPrefill)
    split.cluster.operator.drain(busy, False, split.now)
    split.tell(identity(busy, 1), PrefillDone(sid, 1, 1, 64, (0, 1, 2, 3), FirstRows((5,))))
    assert len(split.sent(StartDecode)) == 1


def test_a_worker_is_drained_once_it_has_nothing_left(split, idle: Load) -> None:
    busy = hand_over(split, 1)
    worker = split.cluster.operator.drain(busy, False, split.now)
    assert not worker.drained
    split.tell(identity(busy, 1), Ended((7, 1), 1, "decode"))
    split.tell(identity(busy, 1), msgspec.structs.replace(idle, last_cmd_seq=99))
    assert worker.drained


def test_a_drain_is_obeyed_once_the_worker_says_that_it_drains(split, idle: Load) -> None:
    worker = split.cluster.operator.drain("decode-0", False, split.now)
    before = msgspec.structs.replace(idle, settings=Settings(role="decode"))
    split.tell(worker.identity, before)  # sent before it was told
    assert not split.cluster.operator.obeyed([worker])
    split.tell(worker.identity, msgspec.structs.replace(idle, settings=worker.settings))
    assert split.cluster.operator.obeyed([worker])


def test_draining_by_moving_retries_the_streams_at_once(split) -> None:
    busy = hand_over(split, 1)
    split.cluster.operator.drain(busy, True, split.now)
    act(split)
    assert [retry.sid for retry in split.sent(Retry)] == [(7, 1)]
    assert [command.sid for command in split.sent(CancelCommand, identity(busy, 1))] == [(7, 1)]


def test_streams_do_not_move_when_nobody_could_take_them(bench) -> None:
    bench.frontend()
    bench.worker("prefill-0")
    bench.worker("decode-0")
    hand_over(bench, 1)
    bench.cluster.operator.drain("prefill-0", False, bench.now)
    text = refused(Why.FAILED_PRECONDITION, lambda: bench.cluster.operator.drain("decode-0", True, bench.now))
    assert "decode-0" in text
    act(bench)
    assert bench.sent(Retry) == []
    assert bench.cluster.operator.worker("decode-0").active


def test_who_waits_for_a_drained_worker_hears_that_it_was_resumed(split) -> None:
    operator = split.cluster.operator
    operator.drain("decode-0", False, split.now)
    assert operator.draining("decode-0").name == "decode-0"
    operator.resume("decode-0")
    assert "resumed" in refused(Why.FAILED_PRECONDITION, lambda: operator.draining("decode-0"))


def test_resume_undoes_drain(split) -> None:
    for name in ("prefill-0", "decode-0", "decode-1"):
        split.cluster.operator.drain(name, False, split.now)
    sid = split.submit(1)
    assert split.sent(StartPrefill) == []
    split.cluster.operator.resume("prefill-0")
    split.cluster.operator.resume("decode-1")
    act(split)
    assert [command.sid for command in split.sent(StartPrefill)] == [sid]


def test_without_an_active_worker_the_cluster_is_not_ready_and_says_who_drains(split) -> None:
    act(split)
    split.sent(ClusterStatus)
    for name in ("prefill-0", "decode-0", "decode-1"):
        split.cluster.operator.drain(name, False, split.now)
    act(split)
    (status,) = split.sent(ClusterStatus)
    assert not status.ready
    assert "prefill-0 is draining" in status.reason
    assert happened(split)[-2:] == [EventKind.WORKER_CHANGED, EventKind.NOT_READY]


def test_a_lost_order_is_sent_again_until_the_worker_says_it_is_so(split, idle: Load) -> None:
    peer = identity("decode-0", 1)
    split.cluster.operator.drain("decode-0", False, split.now)
    act(split)
    (wanted,) = settings_sent(split, peer)
    split.tell(peer, msgspec.structs.replace(idle, settings=Settings(role="decode")))
    assert settings_sent(split, peer) == [wanted]
    split.tell(peer, msgspec.structs.replace(idle, settings=wanted))
    assert settings_sent(split, peer) == []


def test_a_drained_worker_that_crashes_comes_back_drained(split) -> None:
    split.cluster.operator.drain("decode-0", False, split.now)
    split.worker("decode-0", incarnation=2)
    assert settings_sent(split, identity("decode-0", 2)) == [Settings(role="decode", duty=Duty.DRAINING)]
    assert not split.cluster.operator.worker("decode-0").active


def test_a_restarted_scheduler_goes_on_with_what_workers_are(make_bench) -> None:
    bench = make_bench()
    bench.frontend()
    bench.worker("prefill-0")
    bench.worker("decode-0", settings=Settings(role="decode", duty=Duty.DRAINING))
    assert bench.sent(Configure) == []
    assert not bench.cluster.operator.worker("decode-0").active


def test_what_an_earlier_scheduler_was_told_holds_for_the_next_incarnation_too(make_bench) -> None:
    bench = make_bench()
    bench.worker("decode-0", settings=Settings(role="decode", duty=Duty.DRAINING))
    bench.worker("decode-0", incarnation=2)
    assert settings_sent(bench, identity("decode-0", 2)) == [Settings(role="decode", duty=Duty.DRAINING)]


def test_an_order_holds_for_what_it_changed_only(bench) -> None:
    bench.worker("w0", role="decode")
    bench.cluster.operator.flush("w0")
    bench.tell(identity("w0", 1), Goodbye("w0", 1))
    bench.worker("w0", role="prefill", incarnation=2)
    assert bench.cluster.operator.worker("w0").role == "prefill"


def test_only_a_drained_worker_is_removed_without_force(split) -> None:
    operator = split.cluster.operator
    assert "drain it first" in refused(Why.FAILED_PRECONDITION, lambda: operator.remove("decode-0", False))
    operator.drain("decode-0", False, split.now)
    operator.remove("decode-0", False)
    act(split)
    assert settings_sent(split, identity("decode-0", 1))[-1].duty == Duty.LEAVING
    assert "leaving" in refused(Why.FAILED_PRECONDITION, lambda: operator.resume("decode-0"))
    split.tell(identity("decode-0", 1), Goodbye("decode-0", 1))
    refused(Why.NOT_FOUND, lambda: operator.worker("decode-0"))
    split.worker("decode-0", incarnation=2)
    assert operator.worker("decode-0").active


def test_forced_removal_sends_streams_elsewhere(split) -> None:
    busy = hand_over(split, 1)
    split.cluster.operator.remove(busy, True)
    split.tell(identity(busy, 1), Goodbye(busy, 1))
    assert [retry.sid for retry in split.sent(Retry)] == [(7, 1)]


def test_an_idle_worker_takes_another_role(split) -> None:
    operator = split.cluster.operator
    operator.set_role("decode-1", "prefill")
    act(split)
    assert settings_sent(split, identity("decode-1", 1)) == [Settings(role="prefill")]
    left, joined = [i.event for i in split.instructions if isinstance(i, Observe)][-2:]
    assert (left, joined) == (WorkerLeft("decode-1", "decode"), WorkerJoined("decode-1", "prefill"))
    for n in (1, 2):
        split.submit(n)
    assert sorted(split.recipients(StartPrefill)) == ["decode-1", "prefill-0"]


def test_a_worker_with_streams_keeps_its_role(split) -> None:
    busy = hand_over(split, 1)
    text = refused(Why.FAILED_PRECONDITION, lambda: split.cluster.operator.set_role(busy, "prefill"))
    assert "1 streams" in text
    refused(Why.INVALID_ARGUMENT, lambda: split.cluster.operator.set_role(busy, "cook"))


def test_requests_are_listed_oldest_first_and_by_worker(split) -> None:
    busy = hand_over(split, 1)
    split.now += 1
    split.submit(2)
    operator = split.cluster.operator
    assert [stream.sid[1] for stream in operator.requests("")] == [1, 2]
    assert [stream.sid[1] for stream in operator.requests(busy)] == [1]
    refused(Why.NOT_FOUND, lambda: operator.requests("nobody"))


def test_a_request_keeps_its_age_over_attempts(split) -> None:
    split.submit(1)
    born = split.now
    split.now += 5
    split.submit(1, attempt=2)
    assert [stream.arrived for stream in split.cluster.operator.requests("")] == [born]


def cancel(bench) -> bytes:
    """Cancel the first stream; its frontend."""
    (stream,) = bench.cluster.operator.requests("")
    bench.cluster.operator.cancel(stream.id, bench.now)
    act(bench)
    return identity("frontend-0", 7)


def test_cancelling_frees_the_workers_and_tells_the_frontend(split) -> None:
    busy = hand_over(split, 1)
    frontend = cancel(split)
    assert [command.sid for command in split.sent(CancelCommand, identity(busy, 1))] == [(7, 1)]
    assert [message.sid for message in split.sent(Cancelled, frontend)] == [(7, 1)]
    split.tell(frontend, Close((7, 1), 1, "cancelled", 64, 1, Ledger()))
    assert split.sent(CloseAck)
    assert split.cluster.operator.requests("") == []


def test_a_cancel_is_sent_again_until_the_frontend_has_closed(split) -> None:
    hand_over(split, 1)
    cancel(split)
    split.sent(Cancelled)
    split.wait(1.25, identity("frontend-0", 7))
    assert len(split.sent(Cancelled)) == 1


@pytest.mark.parametrize("message", [Accepted, Rejected, StartPrefill])
def test_a_cancelled_stream_is_not_revived_by_its_next_attempt(split, message: type[Message]) -> None:
    hand_over(split, 1)
    cancel(split)
    split.sent(StartPrefill), split.sent(Accepted)
    split.submit(1, attempt=2)
    assert split.sent(message) == []
    assert split.sent(Cancelled)


@pytest.mark.parametrize("name", ["3", "cmpl-3", "chatcmpl-3"])
def test_a_request_is_cancelled_by_its_clients_name(split, name: str) -> None:
    for n in (1, 2, 3):
        split.submit(n, request="" if n == 1 else "3")
    split.cluster.operator.cancel(name, split.now)
    act(split)
    assert [cancelled.sid[1] for cancelled in split.sent(Cancelled)] == [2, 3]


def test_the_id_of_a_stream_that_is_over_names_no_request(split) -> None:
    split.submit(1, request="9")
    assert "7-9" in refused(Why.NOT_FOUND, lambda: split.cluster.operator.cancel("7-9", split.now))


def test_an_unknown_request_can_not_be_cancelled(split) -> None:
    assert "7-9" in refused(Why.NOT_FOUND, lambda: split.cluster.operator.cancel("7-9", split.now))


def test_caches_are_emptied_when_every_worker_says_so(split, idle: Load) -> None:
    operator = split.cluster.operator
    workers = operator.flush("")
    assert not operator.obeyed(workers)
    for worker in workers:
        split.tell(worker.identity, msgspec.structs.replace(idle, settings=worker.settings))
    assert operator.obeyed(workers)
    assert {worker.settings.cache_flushes for worker in workers} == {1}


def test_a_worker_that_dies_is_not_waited_for(split) -> None:
    workers = split.cluster.operator.flush("decode-0")
    split.tell(identity("decode-0", 1), Goodbye("decode-0", 1))
    assert split.cluster.operator.obeyed(workers)


def test_log_levels_reach_workers_frontends_and_the_scheduler(split) -> None:
    names = split.cluster.operator.set_log_level("debug", "")
    act(split)
    assert sorted(names) == ["decode-0", "decode-1", "frontend-0", "prefill-0", "scheduler"]
    assert {settings.log_level for settings in settings_sent(split, identity("decode-0", 1))} == {"debug"}
    assert split.sent(ClusterStatus)[-1].log_level == "debug"
    assert [i.level for i in split.instructions if isinstance(i, SetLogLevel)] == ["debug"]


def test_the_log_level_of_one_process(split) -> None:
    assert split.cluster.operator.set_log_level("error", "decode-0") == ["decode-0"]
    refused(Why.NOT_FOUND, lambda: split.cluster.operator.set_log_level("error", "nobody"))
    refused(Why.INVALID_ARGUMENT, lambda: split.cluster.operator.set_log_level("loud", ""))


def log_levels(bench) -> list[str]:
    """That this scheduler has set for itself."""
    return [i.level for i in bench.instructions if isinstance(i, SetLogLevel)]


def test_a_restarted_scheduler_logs_as_the_one_before_it_was_told_to(split, make_bench) -> None:
    split.cluster.operator.set_log_level("debug", "scheduler")
    act(split)
    status = split.sent(ClusterStatus)[-1]
    assert status.log_level == ""  # the frontend's own is as it was
    restarted = make_bench()
    restarted.frontend(scheduler_log_level=status.scheduler_log_level)
    assert log_levels(restarted) == ["debug"]
    restarted.frontend("frontend-1", scheduler_log_level="debug")
    restarted.cluster.operator.set_log_level("error", "scheduler")
    restarted.frontend("frontend-2", scheduler_log_level="debug")  # has not heard of it yet
    assert log_levels(restarted) == ["debug", "error"]
    assert restarted.sent(ClusterStatus)[-1].scheduler_log_level == "error"


def test_of_a_thousand_workers_that_are_gone_the_oldest_orders_are_forgotten(split) -> None:
    split.cluster.operator.drain("decode-0", False, split.now)
    for n in range(ABSENT_MEMORY + 2):
        split.worker(f"decode-x{n}")
        split.cluster.operator.drain(f"decode-x{n}", False, split.now)
        split.tell(identity(f"decode-x{n}", 1), Goodbye(f"decode-x{n}", 1))
    for name in ("decode-0", "decode-x0", f"decode-x{ABSENT_MEMORY + 1}"):
        split.worker(name, incarnation=2)
    operator = split.cluster.operator
    assert not operator.worker("decode-0").active  # it was there all the time
    assert operator.worker("decode-x0").active
    assert not operator.worker(f"decode-x{ABSENT_MEMORY + 1}").active


def test_a_prompt_that_only_a_draining_worker_could_hold_waits_as_for_one_that_restarts(make_bench) -> None:
    bench = make_bench(no_workers_s=10)
    peers = bench.frontend(), bench.worker("unified-0", num_blocks=4), bench.worker("unified-1")
    bench.wait(60, *peers)
    operator = bench.cluster.operator
    operator.drain("unified-1", False, bench.now)
    bench.submit(1, tokens=400)
    bench.submit(2, tokens=16)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [2]
    bench.wait(5, *peers)
    operator.resume("unified-1")
    bench.wait(1, *peers)
    assert bench.recipients(StartPrefill) == ["unified-1"]
    operator.drain("unified-1", False, bench.now)
    bench.submit(3, tokens=400)
    bench.wait(9, *peers)
    assert bench.sent(Rejected) + bench.sent(Retry) == []
    bench.wait(2, *peers)
    assert "unified-1 would, and is draining" in bench.sent(Retry)[0].reason
    bench.submit(4, tokens=400)
    bench.submit(5, tokens=4000)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["no_workers", "too_long"]


@pytest.mark.parametrize(("tokens", "moves"), [(64, True), (96, True), (97, False), (400, False)])
def test_streams_move_only_if_others_hold_them_however_long_they_have_grown(bench, tokens: int, moves: bool) -> None:
    """Of the 16 tokens of output the scheduler does not know how many are there."""
    bench.frontend()
    peer = bench.worker("unified-0")
    bench.worker("unified-1", num_blocks=7)
    sid = bench.submit(1, tokens=tokens)
    assert bench.recipients(StartPrefill) == ["unified-0"]
    bench.tell(peer, FirstToken(sid, 1))
    operator = bench.cluster.operator
    if moves:
        operator.drain("unified-0", True, bench.now)
        act(bench)
        assert [retry.sid for retry in bench.sent(Retry)] == [sid]
        return
    text = refused(Why.FAILED_PRECONDITION, lambda: operator.drain("unified-0", True, bench.now))
    assert "nobody else holds 1 of them to their end, 7-1 for one; drain without moving" in text
    act(bench)
    assert bench.sent(Retry) == []
    assert operator.worker("unified-0").active
    operator.drain("unified-0", False, bench.now)
    bench.tell(peer, Ended(sid, 1, "prefill"))
    operator.drain("unified-0", True, bench.now)  # the long ones have ended
