"""The scheduler's clock from a worker on another host: how far its times are off, and what is said without them."""

import pytest

from baton.proto.messages import ClockReply, Ledger
from baton.worker.clock import ASK_INTERVAL_S, CHECK_INTERVAL_S, SAMPLES, ClusterClock

AHEAD_S = 5000.0


def ask(clock: ClusterClock, now: float, there_s: float, back_s: float, space: str = "theirs") -> float:
    """A question at `now` whose ways take so long; when the answer is here."""
    clock.asked(now)
    clock.take(ClockReply(now, now + there_s + AHEAD_S, space), now + there_s + back_s)
    return now + there_s + back_s


def ledger() -> Ledger:
    return Ledger(decode_worker="decode-0", stages={"bound": 10.0, "stepped": 10.5})


def test_times_are_translated_both_ways_within_half_of_the_shortest_round_trip() -> None:
    clock = ClusterClock("ours", same_host=False)
    ask(clock, 1.0, there_s=0.2, back_s=0.001)  # held up on its way
    ask(clock, 2.0, there_s=0.001, back_s=0.002)
    ask(clock, 3.0, there_s=0.001, back_s=0.3)
    assert clock.outgoing(ledger()).stages["bound"] == pytest.approx(10.0 + AHEAD_S, abs=0.0015)
    assert clock.outgoing(ledger()).stages["stepped"] == pytest.approx(10.5 + AHEAD_S, abs=0.0015)
    assert clock.local(7.0 + AHEAD_S) == pytest.approx(7.0, abs=0.0015)
    assert clock.next_question() == 3.0 + ASK_INTERVAL_S


def test_an_old_answer_is_forgotten_because_clocks_drift() -> None:
    clock = ClusterClock("ours", same_host=False)
    clock.take(ClockReply(1.0, 1.0 + AHEAD_S + 9, "theirs"), 1.0)
    for second in range(SAMPLES):
        ask(clock, 2.0 + second, there_s=0.01, back_s=0.01)
    assert clock.outgoing(ledger()).stages["bound"] == pytest.approx(10.0 + AHEAD_S)


def test_before_the_first_answer_from_another_host_a_ledger_tells_no_times() -> None:
    clock = ClusterClock("ours", same_host=False)
    assert clock.outgoing(ledger()) == Ledger(decode_worker="decode-0")
    assert clock.local(7.0) == 0.0


def test_one_clock_needs_no_translation_and_one_answer_settles_that() -> None:
    clock = ClusterClock("ours", same_host=True)
    told = ledger()
    assert clock.outgoing(told) is told
    ask(clock, 1.0, there_s=0.001, back_s=0.001, space="ours")
    assert clock.outgoing(told) is told
    assert clock.local(7.0) == 7.0
    assert clock.next_question() == pytest.approx(1.0 + CHECK_INTERVAL_S, abs=0.01)
