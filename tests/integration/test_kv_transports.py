"""Every transport that runs without a GPU, held to the same suite."""

from support.transport_suite import TransportSuite

from baton.kv_transfer.shm import runs


class TestShm(TransportSuite):
    kind = "shm"


def test_runs_join_blocks_that_follow_each_other_on_both_sides() -> None:
    assert list(runs((3, 4, 5, 9, 10), (1, 2, 3, 4, 6))) == [(3, 1, 3), (9, 4, 1), (10, 6, 1)]
