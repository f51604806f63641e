"""Streams that want a vector: the prefill is all of them."""

from collections.abc import Callable
from typing import Any

from baton.proto.messages import Accepted, Close, CloseAck, Ended, Ledger, Rejected, Retry, StartDecode, StartPrefill

Bench = Any


def test_one_goes_to_a_prefill_worker_and_ends_there(bench: Bench) -> None:
    frontend = bench.frontend()
    prefill, decode = bench.worker("prefill-0"), bench.worker("decode-0")
    sid = bench.submit(1, pooling="MEAN")
    [start] = bench.sent(StartPrefill, prefill)
    assert start.params.pooling == "MEAN"
    bench.tell(prefill, Ended(sid, 1, "prefill"))
    bench.tell(frontend, Close(sid, 1, "stop", 64, 0, Ledger()))
    assert bench.sent(CloseAck)
    assert not bench.sent(StartDecode)
    bench.wait(10, frontend, prefill, decode)
    assert not bench.sent(Retry)
    assert bench.cluster.idle


def test_no_decode_worker_is_needed(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(no_workers_s=5, expected_workers=2)
    frontend, prefill = bench.frontend(), bench.worker("prefill-0")
    bench.wait(20, frontend, prefill)
    bench.submit(1)
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["no_workers"]
    bench.submit(2, pooling="LAST")
    assert bench.sent(Accepted)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [2]


def test_one_does_not_wait_behind_those_that_wait_for_a_decode_worker(bench: Bench) -> None:
    bench.frontend()
    bench.worker("prefill-0")
    for n in (1, 2):
        bench.submit(n)
    bench.submit(3, pooling="LAST")
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [3]
    bench.worker("decode-0")
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [1, 2]


def test_one_waits_its_turn_behind_those_that_wait_for_room(bench: Bench) -> None:
    bench.frontend()
    bench.worker("prefill-0", max_num_batched_tokens=16)
    bench.worker("decode-0")
    for n in (1, 2):
        bench.submit(n, tokens=64)
    assert [start.sid[1] for start in bench.sent(StartPrefill)] == [1]
    bench.submit(3, tokens=1, pooling="LAST")
    assert bench.sent(StartPrefill) == []


def test_decode_workers_alone_are_none(make_bench: Callable[..., Bench]) -> None:
    bench = make_bench(no_workers_s=5, expected_workers=2)
    frontend, decode = bench.frontend(), bench.worker("decode-0")
    bench.submit(1, pooling="LAST")
    bench.wait(6, frontend, decode)
    assert "waiting for a prefill worker" in bench.sent(Retry)[0].reason
    bench.submit(2, pooling="LAST")
    assert [rejected.code for rejected in bench.sent(Rejected)] == ["no_workers"]


def test_a_prompt_may_fill_a_worker_to_its_last_token(bench: Bench) -> None:
    peers = bench.frontend(), bench.worker("prefill-0", num_blocks=4), bench.worker("decode-0", num_blocks=2)
    bench.wait(3, *peers)
    bench.submit(1, tokens=64, pooling="LAST")
    assert bench.recipients(StartPrefill) == ["prefill-0"]
    bench.submit(2, tokens=65, pooling="LAST")
    bench.submit(3, tokens=64)
    rejected = bench.sent(Rejected)
    assert [each.code for each in rejected] == ["too_long", "too_long"]
    assert "room for output" not in rejected[0].message


def test_a_lost_end_is_noticed(bench: Bench) -> None:
    frontend, prefill = bench.frontend(), bench.worker("prefill-0")
    sid = bench.submit(1, pooling="LAST")
    bench.tell(prefill, Ended(sid, 1, "prefill"))
    bench.wait(bench.config.reconcile_after_s + 1, frontend, prefill)
    assert bench.sent(Retry)[0].sid == sid
