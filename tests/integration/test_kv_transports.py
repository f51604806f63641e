"""Every transport that runs without a GPU, held to the same suite."""

from support.transport_suite import TransportSuite, start_garbage_thread

from baton.kv_transfer.movers import runs


class TestShm(TransportSuite):
    kind = "shm"


class TestTcp(TransportSuite):
    kind = "tcp"

    def warm_up(self) -> None:
        start_garbage_thread()


class TestGloo(TransportSuite):
    kind = "gloo"


def test_runs_join_blocks_that_follow_each_other_on_both_sides() -> None:
    assert list(runs([30, 40, 50, 90, 100], [10, 20, 30, 40, 60], 10)) == [(30, 10, 3), (90, 40, 1), (100, 60, 1)]
