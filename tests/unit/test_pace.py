"""What a step is expected to take."""

import pytest

from baton.worker.pace import Pace


def test_expectations_grow_with_the_step_and_are_never_tiny() -> None:
    pace = Pace()
    assert pace.expected_s(1) == pace.expected_s(10_000) == 0.5
    pace.learn(100, 1.0)
    assert pace.expected_s(1) == 0.5
    assert pace.expected_s(1000) == 10.0


def test_a_slow_step_is_forgotten_slowly() -> None:
    pace = Pace()
    pace.learn(100, 10.0)
    pace.learn(100, 1.0)
    assert pace.expected_s(100) == pytest.approx(9.0)
    for _ in range(100):
        pace.learn(100, 1.0)
    assert pace.expected_s(100) == pytest.approx(1.0)
