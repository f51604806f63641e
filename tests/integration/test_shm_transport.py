"""The shared-memory transport: bytes, refusals, restarts, and nothing left behind."""

import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from baton.kv_transfer.contract import Pull, PullDone
from baton.kv_transfer.shm import Greeting, ShmSink, ShmSource, runs
from baton.proto.layout import Group, KVLayout
from baton.proto.messages import Peer
from baton.worker.kv_pool import HostPool

SHAPE = (2, 3, 2, 16, 8)
GROUP = Group(
    "full", 3, 16, 2 * 3 * 2 * 16 * 8 * 4, ("kv_heads", "layers", "kv", "tokens", "head_dim"), SHAPE, "float32"
)
LAYOUT = KVLayout("model", (GROUP,))


@dataclass
class Side:
    """One worker's pool with both halves of the transport."""

    pool: HostPool
    source: ShmSource
    sink: ShmSink
    peer: Peer

    def close(self) -> None:
        self.sink.close()
        self.source.close()
        self.pool.close()

    def pull(self, transfer: int, owner: Peer, source: list[int], target: list[int]) -> PullDone:
        self.sink.start(Pull(transfer, owner, tuple(source), tuple(target)))
        assert select.select([self.sink], [], [], 10)[0]
        (done,) = self.sink.completed()
        assert done.transfer == transfer
        return done


def side(folder: Path, name: str, incarnation: int, layout: KVLayout = LAYOUT) -> Side:
    pool = HostPool(layout, 12)
    pool.tensor.normal_()
    greeting = Greeting(layout, name, incarnation, 12)
    source = ShmSource(folder / f"{name}-{incarnation}.kv", greeting, pool.memfd)
    sink = ShmSink(greeting, pool.address, pool.block_bytes)
    return Side(pool, source, sink, Peer(name, incarnation, "", source.address))


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[Side, Side]]:
    before = len(os.listdir("/proc/self/fd"))
    owner, reader = side(tmp_path, "prefill-0", 1), side(tmp_path, "decode-0", 2)
    yield owner, reader
    reader.close()
    owner.close()
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_scattered_blocks_arrive_and_no_other_is_touched(pair: tuple[Side, Side]) -> None:
    owner, reader = pair
    before = reader.pool.tensor.clone()
    done = reader.pull(1, owner.peer, [3, 4, 5, 11, 0], [7, 8, 1, 2, 3])
    assert done == PullDone(1, ok=True, transport="shm", num_bytes=5 * GROUP.block_bytes)
    expected = before.clone()
    expected[[7, 8, 1, 2, 3]] = owner.pool.tensor[[3, 4, 5, 11, 0]]
    assert torch.equal(reader.pool.tensor, expected)


def test_both_directions_use_one_pool_each(pair: tuple[Side, Side]) -> None:
    left, right = pair
    assert right.pull(1, left.peer, [0], [1]).ok
    assert left.pull(1, right.peer, [1], [2]).ok
    assert torch.equal(left.pool.tensor[2], left.pool.tensor[0])


def test_later_writes_of_the_owner_are_seen_by_the_next_pull(pair: tuple[Side, Side]) -> None:
    owner, reader = pair
    reader.pull(1, owner.peer, [0], [0])
    owner.pool.tensor[0].fill_(5.0)
    reader.pull(2, owner.peer, [0], [0])
    assert torch.equal(reader.pool.tensor[0], owner.pool.tensor[0])


def test_another_layout_is_refused_with_both_sides_named(pair: tuple[Side, Side], tmp_path: Path) -> None:
    owner, _ = pair
    stranger = side(tmp_path, "decode-9", 9, KVLayout("another model", (GROUP,)))
    try:
        done = stranger.pull(1, owner.peer, [0], [0])
    finally:
        stranger.close()
    assert not done.ok
    assert "prefill-0" in done.reason
    assert "decode-9" in done.reason
    assert "another model" in done.reason


def test_an_owner_that_left_fails_the_pull_and_a_new_one_serves(pair: tuple[Side, Side], tmp_path: Path) -> None:
    _, reader = pair
    old = side(tmp_path, "prefill-1", 5)
    assert reader.pull(1, old.peer, [0], [0]).ok
    old.close()
    gone = Peer("prefill-1", 6, "", old.source.address)
    assert not reader.pull(2, gone, [0], [0]).ok
    new = side(tmp_path, "prefill-1", 7)
    try:
        assert reader.pull(3, new.peer, [1], [4]).ok
        assert torch.equal(reader.pool.tensor[4], new.pool.tensor[1])
    finally:
        new.close()


def test_a_restarted_owner_on_the_same_address_is_not_mistaken_for_the_old_one(pair: tuple[Side, Side]) -> None:
    owner, reader = pair
    stale = Peer("prefill-0", 999, "", owner.peer.kv_endpoint)
    done = reader.pull(1, stale, [0], [0])
    assert not done.ok
    assert "restarted" in done.reason


def test_a_block_beyond_the_owners_pool_is_refused(pair: tuple[Side, Side]) -> None:
    owner, reader = pair
    assert not reader.pull(1, owner.peer, [12], [0]).ok


def test_runs_join_blocks_that_follow_each_other_on_both_sides() -> None:
    assert list(runs((3, 4, 5, 9, 10), (1, 2, 3, 4, 6))) == [(3, 1, 3), (9, 4, 1), (10, 6, 1)]
