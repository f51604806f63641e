"""How often something may happen."""

import pytest

from baton.frontend.rates import Rate


def test_a_burst_passes_and_what_follows_waits_for_its_turn() -> None:
    rate = Rate(per_s=10, burst=3, max_wait_s=5)
    assert [rate.wait_s(1, now=100.0) for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    assert rate.wait_s(1, now=100.3) == 0
    assert [rate.wait_s(1, now=200.0) for _ in range(4)] == pytest.approx([0, 0, 0, 0.1])


def test_nobody_waits_for_ever_and_a_flood_is_forgotten_as_soon() -> None:
    rate = Rate(per_s=10, burst=1, max_wait_s=1)
    assert max(rate.wait_s(1, now=0.0) for _ in range(1000)) == pytest.approx(1.0)
    assert rate.wait_s(1, now=1.2) == 0


def test_amounts_need_not_be_whole() -> None:
    rate = Rate(per_s=100, burst=50, max_wait_s=10)
    assert rate.wait_s(150, now=10.0) == pytest.approx(1.0)
