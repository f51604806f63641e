"""When a dead process is started again, on a virtual clock."""

from baton.frontend.restart import LONGEST_DELAY_S, STABLE_S, RestartPolicy


def test_first_restart_is_at_once_and_later_ones_back_off() -> None:
    policy = RestartPolicy()
    delays = []
    for now in range(9):
        policy.became_ready(now)
        delays.append(policy.died(now + 0.5))
    assert delays == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, LONGEST_DELAY_S, LONGEST_DELAY_S, LONGEST_DELAY_S]


def test_a_process_that_dies_for_days_is_started_again_every_time() -> None:
    policy = RestartPolicy()
    for now in range(2000):
        policy.became_ready(now)
        delay = policy.died(now + 0.5)
    assert delay == LONGEST_DELAY_S


def test_a_long_ready_time_makes_up_for_earlier_deaths() -> None:
    policy = RestartPolicy()
    for now in range(3):
        policy.became_ready(now)
        policy.died(now + 0.5)
    policy.became_ready(10.0)
    assert policy.died(10.0 + STABLE_S) == 0.0


def test_three_deaths_before_ready_in_a_row_give_up() -> None:
    policy = RestartPolicy()
    assert [policy.died(float(now)) for now in range(3)] == [0.0, 1.0, None]


def test_becoming_ready_forgives_failed_starts() -> None:
    policy = RestartPolicy()
    policy.died(0.0)
    policy.died(1.0)
    policy.became_ready(2.0)
    assert policy.died(3.0) is not None
    assert policy.died(4.0) is not None
