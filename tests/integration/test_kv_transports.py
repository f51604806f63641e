"""Every transport that runs without a GPU, held to the same suite."""

from pathlib import Path

import pytest
from support.kv_side import LAYOUT, NUM_BLOCKS, Side
from support.transport_suite import TransportSuite, start_garbage_thread

from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.movers import runs
from baton.kv_transfer.source import PeerSource
from baton.kv_transfer.transports import open_transports
from baton.proto.messages import Peer
from baton.proto.network import Network
from baton.worker.kv_pool import HostPool


class TestShm(TransportSuite):
    kind = "shm"


class TestTcp(TransportSuite):
    kind = "tcp"

    def warm_up(self) -> None:
        start_garbage_thread()


class TestFarTcp(TestTcp):
    """Between hosts: no Unix socket, no memory file, the cluster's key."""

    kind = "far tcp"


class TestGloo(TransportSuite):
    kind = "gloo"


def test_a_transport_that_fails_to_open_gives_way_to_the_next(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pool = HostPool(LAYOUT, NUM_BLOCKS)
    network = Network()
    transports = open_transports("auto", pool, tmp_path, network)
    greeting = Greeting(LAYOUT, "prefill-0", 11, NUM_BLOCKS)
    without_memfd = PeerSource(tmp_path / "owner.kv", greeting, transports, -1, network)
    reader = Side("auto", tmp_path, "decode-0", 22)
    try:
        done = reader.pull(Peer("prefill-0", 11, "", without_memfd.address), [0], [1])
        (link,) = reader.sink.links()
    finally:
        reader.close()
        without_memfd.close()
        network.close()
        pool.close()
    assert done.ok
    assert done.transport == "tcp"
    assert (link.owner, link.transport) == ("prefill-0", "tcp")
    assert link.reason.startswith("shm failed: ")
    assert "decode-0 reads prefill-0 through tcp (shm failed: " in caplog.text


def test_runs_join_blocks_that_follow_each_other_on_both_sides() -> None:
    assert list(runs([30, 40, 50, 90, 100], [10, 20, 30, 40, 60], 10)) == [(30, 10, 3), (90, 40, 1), (100, 60, 1)]
