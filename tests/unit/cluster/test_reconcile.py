"""What the scheduler believes against what workers hold, and how a restarted scheduler finds its streams again."""

from typing import Any

import msgspec

from baton.proto.messages import CancelCommand, Claim, Ended, FirstRows, Holding, Load, PrefillDone, Retry, StartPrefill

Bench = Any
SID = (7, 1)


def report(idle: Load, last_cmd_seq: int, *holdings: Holding) -> Load:
    return msgspec.structs.replace(idle, last_cmd_seq=last_cmd_seq, holdings=holdings)


def test_a_stream_missing_from_its_workers_holdings_is_retried(bench: Bench, idle: Load) -> None:
    bench.frontend()
    worker = bench.worker("unified-0")
    sid = bench.submit(1)
    bench.tell(worker, report(idle, 1))
    bench.wait(2.9)
    bench.tell(worker, report(idle, 1))
    assert not bench.sent(Retry)
    bench.wait(0.2)
    bench.tell(worker, report(idle, 1))
    assert [retry.sid for retry in bench.sent(Retry)] == [sid]
    assert bench.sent(CancelCommand)


def test_a_listed_stream_is_left_alone(bench: Bench, idle: Load) -> None:
    bench.frontend()
    worker = bench.worker("unified-0")
    sid = bench.submit(1)
    for _ in range(10):
        bench.wait(1)
        bench.tell(worker, report(idle, 1, Holding(sid, 1, "prefill")))
    assert not bench.sent(Retry)
    assert not bench.sent(CancelCommand)


def test_a_lost_command_is_noticed_although_no_later_one_was_applied(bench: Bench, idle: Load) -> None:
    bench.frontend()
    worker = bench.worker("unified-0")
    bench.submit(1)
    for _ in range(8):
        bench.wait(1)
        bench.tell(worker, report(idle, 0))
    assert bench.sent(Retry)


def test_a_holding_that_nobody_knows_is_cancelled_after_the_grace_time(bench: Bench, idle: Load) -> None:
    worker = bench.worker("unified-0", holdings=(Holding(SID, 2, "prefill"),))
    assert not bench.sent(CancelCommand)
    bench.wait(bench.config.grace_s)
    bench.tell(worker, report(idle, 0, Holding(SID, 2, "prefill")))
    [cancel] = bench.sent(CancelCommand)
    assert (cancel.sid, cancel.attempt) == (SID, 2)


def test_a_holding_of_an_older_attempt_is_cancelled_at_once(bench: Bench, idle: Load) -> None:
    bench.frontend()
    worker = bench.worker("unified-0")
    bench.submit(1, attempt=2)
    bench.tell(worker, report(idle, 1, Holding(SID, 1, "prefill"), Holding(SID, 2, "prefill")))
    assert [cancel.attempt for cancel in bench.sent(CancelCommand)] == [1]


def test_after_a_restart_claim_and_holding_make_a_stream(bench: Bench, idle: Load) -> None:
    worker = bench.worker("decode-0", holdings=(Holding(SID, 3, "decode"),))
    bench.frontend(claims=(Claim(SID, 3, 64),))
    bench.wait(5, worker)
    bench.tell(worker, report(idle, 0, Holding(SID, 3, "decode")))
    assert not bench.sent(Retry)
    assert not bench.sent(CancelCommand)
    bench.tell(worker, Ended(SID, 3, "decode", "the device failed"))
    assert bench.sent(Retry)


def test_the_order_of_claim_and_holding_does_not_matter(bench: Bench) -> None:
    bench.frontend(claims=(Claim(SID, 3, 64),))
    bench.worker("decode-0", holdings=(Holding(SID, 3, "decode"),))
    bench.wait(bench.config.grace_s + 1)
    assert not bench.sent(Retry)


def test_a_claim_alone_is_retried_after_the_grace_time(bench: Bench) -> None:
    frontend = bench.frontend(claims=(Claim(SID, 3, 64),))
    bench.wait(bench.config.grace_s - 0.3, frontend)
    assert not bench.sent(Retry)
    bench.wait(0.5, frontend)
    assert bench.sent(Retry)[0].attempt == 3


def test_an_adopted_prefill_can_not_be_handed_over_without_its_prompt(bench: Bench) -> None:
    prefill = bench.worker("prefill-0", holdings=(Holding(SID, 1, "prefill"),))
    bench.worker("decode-0")
    bench.frontend(claims=(Claim(SID, 1, 64),))
    bench.tell(prefill, PrefillDone(SID, 1, 5, 64, (0, 1, 2, 3), FirstRows((42,))))
    assert "earlier scheduler" in bench.sent(Retry)[0].reason
    bench.submit(1, attempt=2)
    assert bench.sent(StartPrefill, prefill)


def test_an_adopted_prefill_is_not_waited_for(bench: Bench) -> None:
    bench.worker("prefill-0", holdings=(Holding(SID, 1, "prefill"),))
    bench.frontend(claims=(Claim(SID, 1, 64),))
    bench.wait(bench.config.grace_s + 0.5)
    assert bench.sent(Retry)


def test_the_second_leg_of_an_adopted_stream_may_come_later(bench: Bench) -> None:
    bench.worker("prefill-0", holdings=(Holding(SID, 1, "prefill"),))
    bench.frontend(claims=(Claim(SID, 1, 64),))
    bench.worker("decode-0", holdings=(Holding(SID, 1, "decode"),))
    bench.wait(bench.config.grace_s + 0.5)
    assert not bench.sent(Retry)
    assert not bench.sent(CancelCommand)
