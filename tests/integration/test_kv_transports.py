"""Every transport that runs without a GPU, held to the same suite."""

import contextlib
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from support.kv_side import DEADLINE_S, LAYOUT, NUM_BLOCKS, Child, Side
from support.transport_suite import MANY, TransportSuite, start_garbage_thread
from support.worker_bench import BLOCK, Bench, to_scheduler, tokens

from baton.kv_transfer.contract import Pull, TransferError
from baton.kv_transfer.fetch import Attached, attach
from baton.kv_transfer.gloo import GlooLink, GlooTransport
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.movers import runs
from baton.kv_transfer.sink import PeerSink
from baton.kv_transfer.source import PeerSource
from baton.kv_transfer.tcp import TcpTransport
from baton.kv_transfer.transports import open_transports
from baton.proto.messages import Peer, PrefillDone
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


class TestTcpInManyPieces(TestTcp):
    """A pull is many pieces, and more of them are under way than go into the window."""

    kind = "small tcp"


class TestGloo(TransportSuite):
    kind = "gloo"


class TestGlooInManyPieces(TransportSuite):
    kind = "small gloo"


class TestLocal:
    """Both legs on one worker: a lease's blocks become the stream's, and no byte moves."""

    @pytest.fixture
    def worker(self) -> Iterator[Bench]:
        worker = Bench("unified-0", num_blocks=NUM_BLOCKS, budget=4096)
        yield worker
        assert worker.batcher.pool.num_used == 0

    def prefill(self, worker: Bench, n: int, prompt: list[int]) -> PrefillDone:
        worker.prefill(n, prompt, hand_over=True)
        (done,) = to_scheduler(worker.run(), PrefillDone)
        assert isinstance(done, PrefillDone)
        return done

    def test_the_same_blocks_go_on_and_none_is_pulled(self, worker: Bench) -> None:
        done = self.prefill(worker, 1, list(range(5 * BLOCK)))
        before = worker.batcher.pool.num_used
        out = worker.decode(worker, done)
        assert worker.batcher.pool.num_used == before
        out += worker.run()
        assert not [effect for effect in out if isinstance(effect, Pull)]
        assert tokens(out, 1)[: len(done.first_rows.tokens)] == list(done.first_rows.tokens)

    def test_a_shared_beginning_is_held_once(self, worker: Bench) -> None:
        first = self.prefill(worker, 1, list(range(5 * BLOCK)))
        second = self.prefill(worker, 2, list(range(6 * BLOCK)))
        assert second.blocks[:4] == first.blocks[:4]
        for done in (first, second):
            worker.decode(worker, done)
        assert len(tokens(worker.run(), 2)) >= 1

    @pytest.mark.parametrize("moment", ["before", "after"])
    def test_a_lease_that_is_gone_is_not_taken_over(self, worker: Bench, moment: str) -> None:
        done = self.prefill(worker, 1, list(range(5 * BLOCK)))
        if moment == "before":
            worker.now += 60.0
            worker.batcher.tick(worker.now)
            worker.take()
        else:  # consumed: a second leg of the same attempt is a duplicate
            worker.decode(worker, done)
            worker.run()
        out = worker.decode(worker, done) + worker.run()
        assert not tokens(out, 1)

    def test_many_handoffs_in_flight(self, worker: Bench) -> None:
        leases = [self.prefill(worker, n, list(range(32 * n, 32 * n + 20))) for n in range(MANY)]
        assert worker.batcher.pool.num_used == 2 * MANY
        out = [effect for done in leases for effect in worker.decode(worker, done)]
        assert worker.batcher.pool.num_used == 2 * MANY
        out += worker.run(limit=10 * MANY)
        assert all(len(tokens(out, n)) == 4 for n in range(MANY))


class NeverMeets(GlooTransport):
    """Two sides that find each other over the connection, and then do not come together, whoever says so first."""

    def __init__(self, pool: HostPool, folder: Path, owner_first: bool) -> None:
        super().__init__(pool.blocks, folder)
        self._owner_first = owner_first

    def open(self, offer: msgspec.Raw, connection: socket.socket | None, memfd: int) -> GlooLink:
        assert connection is not None
        attach(connection, self.name)
        if self._owner_first:
            assert connection.recv(1) == b""
        raise TransferError("they do not meet")

    def serve(self, connection: socket.socket) -> None:
        connection.send(msgspec.msgpack.encode(Attached(("",))))
        if not self._owner_first:
            connection.recv(1)
        raise TransferError("they do not meet")


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_what_waits_is_not_copied_from_an_owner_that_leaves(kind: str, tmp_path: Path) -> None:
    """Of 200 pulls of the whole pool nearly all wait when it goes."""
    reader, owner = Side(kind, tmp_path, "decode-0", 22), Child(kind, tmp_path, "prefill-0", 11)
    try:
        for number in range(200):
            reader.start(number, owner.peer, range(NUM_BLOCKS), range(NUM_BLOCKS))
        done = reader.wait()
        owner.leave()
        done += reader.wait(200 - len(done))
        assert sum(each.ok for each in done) < 150
    finally:
        owner.close()
        reader.close()


@pytest.mark.parametrize("owner_first", [True, False])
def test_one_that_fails_after_it_took_the_connection_over_gives_way_too(owner_first: bool, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        pools = [HostPool(LAYOUT, NUM_BLOCKS) for _ in range(2)]
        network = Network()
        both = [
            (NeverMeets(pool, tmp_path, owner_first), TcpTransport(pool.blocks, tmp_path, network)) for pool in pools
        ]
        greetings = [Greeting(LAYOUT, f"worker-{i}", i + 1, NUM_BLOCKS) for i in range(2)]
        for resource in (*pools, network):
            stack.callback(resource.close)
        source = PeerSource(tmp_path / "owner.kv", greetings[0], both[0], -1, network)
        stack.callback(source.close)
        sink = PeerSink(greetings[1], both[1], network)
        stack.callback(sink.close)
        for transport in both[1]:
            stack.callback(transport.close)
        for number in range(12):
            sink.start(Pull(number, Peer("worker-0", 1, "", source.address), np.array([3]), np.array([5])))
            assert select.select([sink], [], [], DEADLINE_S)[0]
            (done,) = sink.completed()
            assert (done.ok, done.transport) == (True, "tcp"), done.reason
        (link,) = sink.links()
        assert link.reason == "gloo failed: they do not meet"


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
