"""What every transport must do, between real processes: subclass TransportSuite with the transport's name as `kind`."""

import contextlib
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
import zmq
from support.kv_side import GROUP, NUM_BLOCKS, Child, Side, content, start_fork_server
from support.worker_bench import BLOCK, Bench, to_scheduler

from baton.kv_transfer.contract import Pull, PullDone
from baton.proto.curve import create_key
from baton.proto.layout import KVLayout
from baton.proto.messages import Ended, Peer, PrefillDone
from baton.worker import effects

MANY = 1000


class TransportSuite:
    """`kind` is the transport under test, after its device; the reader is in this process, its peers are children."""

    kind: str
    peer_kind = ""
    """Of the children; empty: the same."""
    kept: frozenset[str] = frozenset()
    """Kinds of files that the library behind the transport leaves open for each pair."""

    @pytest.fixture
    def owner(self, child: Callable[..., Child]) -> Child:
        return child("prefill-0", 11)

    @pytest.fixture
    def child(self, tmp_path: Path, reader: Side) -> Iterator[Callable[..., Child]]:
        """Starts one; all are ended, and have left nothing, after the test."""
        children: list[Child] = []

        def start(name: str, incarnation: int, fingerprint: str = "model") -> Child:
            children.append(Child(self.peer_kind or self.kind, tmp_path, name, incarnation, fingerprint))
            return children[-1]

        yield start
        for each in children:
            each.close()

    @pytest.fixture
    def reader(self, tmp_path: Path) -> Iterator[Side]:
        start_fork_server()
        self.warm_up()
        if self.kind.startswith("far "):
            create_key(tmp_path)
        descriptors, threads, pools = open_files(self.kept), threading.active_count(), pools_mapped()
        side = Side(self.kind, tmp_path, "decode-0", 22)
        yield side
        side.close()
        assert open_files(self.kept) == descriptors
        assert threading.active_count() == threads
        assert pools_mapped() == pools
        assert not [path for path in tmp_path.iterdir() if path.is_socket() and str(os.getpid()) in path.name]

    def warm_up(self) -> None:
        """What a process opens once and keeps, so that it is not taken for a leak."""

    # ------------------------------------------------------------------------------------------------------- bytes

    def test_scattered_blocks_arrive_and_no_other_is_touched(self, reader: Side, owner: Child) -> None:
        source, target = [3, 4, 5, NUM_BLOCKS - 1, 0], [7, 8, 1, 2, NUM_BLOCKS - 1]
        done = reader.pull(owner.peer, source, target)
        assert done == PullDone(1, ok=True, transport=self.kind.split()[-1], num_bytes=5 * GROUP.block_bytes)
        expected = content(22)
        expected[target] = content(11)[source]
        assert torch.equal(reader.blocks(), expected)

    def test_a_pull_of_the_whole_pool(self, reader: Side, owner: Child) -> None:
        source, target = random.sample(range(NUM_BLOCKS), NUM_BLOCKS), random.sample(range(NUM_BLOCKS), NUM_BLOCKS)
        assert reader.pull(owner.peer, source, target).ok
        expected = torch.empty_like(content(22))
        expected[target] = content(11)[source]
        assert torch.equal(reader.blocks(), expected)

    def test_a_later_pull_sees_what_the_owner_has_written_since(self, reader: Side, owner: Child) -> None:
        assert reader.pull(owner.peer, [0], [0]).ok
        owner.fill(0, 5.0)
        assert reader.pull(owner.peer, [0], [0]).ok
        assert (reader.blocks()[0] == 5.0).all()

    def test_both_directions_at_once(self, reader: Side, owner: Child) -> None:
        half = range(NUM_BLOCKS // 2)
        rest = range(NUM_BLOCKS // 2, NUM_BLOCKS)
        owner.start([Pull(i, reader.peer, np.array([block]), np.array([rest[i]])) for i, block in enumerate(half)])
        for i, block in enumerate(half):
            reader.start(i, owner.peer, (block,), (rest[i],))
        assert all(done.ok for done in reader.wait(len(half)))
        assert all(owner.done().ok for _ in half)
        mine, theirs = content(22), content(11)
        assert torch.equal(reader.blocks(), torch.cat([mine[: len(half)], theirs[: len(half)]]))
        assert torch.equal(owner.blocks(), torch.cat([theirs[: len(half)], mine[: len(half)]]))

    def test_many_pulls_in_flight_end_once_each(self, reader: Side, child: Callable[..., Child]) -> None:
        owners = [child(f"prefill-{i}", 11 + i) for i in range(2)]
        for i in range(MANY):
            reader.start(i, owners[i % 2].peer, (NUM_BLOCKS - 1 - i, i), (2 * i, 2 * i + 1))
        done = reader.wait(MANY)
        assert sorted(each.transfer for each in done) == list(range(MANY))
        assert all(each.ok for each in done)
        blocks, contents = reader.blocks(), [content(11), content(12)]
        for i in range(MANY):
            assert torch.equal(blocks[2 * i : 2 * i + 2], contents[i % 2][[NUM_BLOCKS - 1 - i, i]])

    # --------------------------------------------------------------------------------------------------- refusals

    @pytest.mark.parametrize("difference", ["model", "block size", "dtype"])
    def test_another_layout_is_refused_with_both_sides_named(
        self, difference: str, reader: Side, owner: Child, tmp_path: Path
    ) -> None:
        group = {
            "model": GROUP,
            "block size": msgspec.structs.replace(
                GROUP, tokens_per_block=32, block_bytes=2 * GROUP.block_bytes, shape=(2, 3, 2, 32, 8)
            ),
            "dtype": msgspec.structs.replace(GROUP, dtype="float16", block_bytes=GROUP.block_bytes // 2),
        }[difference]
        layout = KVLayout("another model" if difference == "model" else "model", (group,))
        stranger = Side(self.kind, tmp_path, "decode-9", 99, layout)
        try:
            done = stranger.pull(owner.peer, [0], [0])
        finally:
            stranger.close()
        assert not done.ok
        assert "prefill-0" in done.reason
        assert "decode-9" in done.reason
        assert reader.pull(owner.peer, [0], [0]).ok

    def test_a_block_beyond_the_owners_pool_is_refused(self, reader: Side, owner: Child) -> None:
        done = reader.pull(owner.peer, [NUM_BLOCKS], [0])
        assert not done.ok
        assert f"block {NUM_BLOCKS}" in done.reason
        assert reader.pull(owner.peer, [NUM_BLOCKS - 1], [0]).ok

    def test_a_restarted_owner_is_not_mistaken_for_the_one_before(self, reader: Side, owner: Child) -> None:
        before = msgspec.structs.replace(owner.peer, incarnation=10)
        done = reader.pull(before, [0], [0])
        assert not done.ok
        assert "restarted" in done.reason

    # ----------------------------------------------------------------------------------------------------- deaths

    def test_an_owner_killed_before_it_was_ever_reached(self, reader: Side, owner: Child) -> None:
        owner.kill()
        done = reader.pull(owner.peer, [0], [0])
        assert not done.ok
        assert "prefill-0" in done.reason

    def test_a_stopped_owner_holds_up_no_other(self, reader: Side, owner: Child, child: Callable[..., Child]) -> None:
        other = child("prefill-1", 12)
        owner.stop()
        reader.start(1, owner.peer, (0,), (0,))
        reader.start(2, other.peer, (0,), (1,))
        (done,) = reader.wait()
        assert (done.transfer, done.ok) == (2, True)
        owner.kill()
        (done,) = reader.wait()
        assert (done.transfer, done.ok) == (1, False)

    def test_an_owner_killed_before_the_pull(self, reader: Side, owner: Child, child: Callable[..., Child]) -> None:
        assert reader.pull(owner.peer, [1], [1]).ok
        owner.kill()
        assert not reader.pull(owner.peer, [0], [0]).ok
        again = child("prefill-0", 12)
        assert reader.pull(again.peer, [0], [0]).ok
        assert torch.equal(reader.blocks()[0], content(12)[0])

    def test_an_owner_leaves_amid_pulls_without_harm(self, reader: Side, owner: Child) -> None:
        for i in range(MANY):
            reader.start(i, owner.peer, (i,), (i,))
        done = reader.wait()
        owner.leave()
        done += reader.wait(MANY - len(done))
        right = [each.transfer for each in done if each.ok]
        assert torch.equal(reader.blocks()[right], content(11)[right])
        assert not reader.pull(owner.peer, [0], [0]).ok

    def test_an_owner_killed_amid_pulls_harms_no_other(
        self, reader: Side, owner: Child, child: Callable[..., Child]
    ) -> None:
        other = child("prefill-1", 12)
        for i in range(MANY):
            reader.start(i, owner.peer, (i,), (i,))
        done = reader.wait()
        owner.kill()
        for i in range(MANY, MANY + 100):
            reader.start(i, other.peer, (i,), (i,))
        done += reader.wait(MANY + 100 - len(done))
        assert sorted(each.transfer for each in done) == list(range(MANY + 100))
        assert all(each.ok for each in done if each.transfer >= MANY)
        right = [each.transfer for each in done if each.ok and each.transfer < MANY]
        blocks = reader.blocks()
        assert torch.equal(blocks[right], content(11)[right])
        assert torch.equal(blocks[MANY : MANY + 100], content(12)[MANY : MANY + 100])

    def test_a_reader_killed_amid_pulls_harms_no_other(
        self, reader: Side, owner: Child, child: Callable[..., Child]
    ) -> None:
        owner.start([Pull(i, reader.peer, np.array([i]), np.array([i])) for i in range(MANY)])
        assert owner.done().ok
        owner.kill()
        again = child("decode-1", 12)
        again.start([Pull(0, reader.peer, np.array([7]), np.array([8]))])
        assert again.done().ok
        assert torch.equal(again.blocks()[8], content(22)[7])

    def test_an_owner_killed_after_the_pull_confirms_nothing(self, reader: Side, owner: Child) -> None:
        handoff = Handoff(reader, owner.peer)
        handoff.begin(1, length=20 * BLOCK)
        handoff.owner_is_gone = True
        ended = handoff.finish()
        assert [message.retry for message in ended] == ["prefill-0, which has its KV, does not answer"]
        assert handoff.decode.batcher.pool.num_used == 0

    def test_a_reader_killed_after_its_pull_leaves_the_owner_its_blocks(self, reader: Side, owner: Child) -> None:
        handoff = Handoff(reader, owner.peer)
        handoff.begin(1, length=20 * BLOCK)
        for done in reader.wait():
            assert done.ok  # and nobody is left to confirm it
        assert handoff.prefill.batcher.pool.num_used == 20
        handoff.expire()
        assert handoff.prefill.batcher.pool.num_used == 0

    # ----------------------------------------------------------------------------------------------------- leases

    def test_a_handoff_moves_only_what_the_reader_lacks(self, reader: Side, owner: Child) -> None:
        handoff = Handoff(reader, owner.peer)
        first = handoff.begin(1, length=4 * BLOCK)
        handoff.finish()
        assert first == 4
        assert handoff.begin(2, length=6 * BLOCK) == 2  # the same beginning, two blocks more
        handoff.finish()
        assert handoff.decode.batcher.pool.num_used == 0

    @pytest.mark.parametrize("moment", ["before", "during", "after"])
    def test_a_lease_that_is_gone_fails_the_leg_and_frees_its_blocks(
        self, moment: str, reader: Side, owner: Child
    ) -> None:
        handoff = Handoff(reader, owner.peer)
        handoff.begin(1, length=20 * BLOCK, gone=moment)
        pool = handoff.decode.batcher.pool
        if moment == "during":
            # The transport may still be writing: nobody gets the blocks before it says that it is done.
            assert pool.num_used == 20
        ended = handoff.finish()
        assert [message.retry for message in ended] == ["the lease on its KV is gone"]
        assert pool.num_used == 0
        assert handoff.prefill.batcher.pool.num_used == 0

    def test_many_handoffs_in_flight_each_get_their_own_blocks(self, reader: Side, owner: Child) -> None:
        handoff = Handoff(reader, owner.peer)
        moved = [handoff.begin(n, length=2 * BLOCK, first_token=2 * BLOCK * n) for n in range(MANY)]
        assert moved == [2] * MANY
        assert handoff.decode.batcher.pool.num_used == 2 * MANY
        source = np.concatenate([pull.source for pull in handoff.pulls])
        target = np.concatenate([pull.target for pull in handoff.pulls])
        assert handoff.finish() == []
        assert torch.equal(reader.blocks()[target], content(owner.peer.incarnation)[source])
        assert handoff.prefill.batcher.pool.num_used == handoff.decode.batcher.pool.num_used == 0


def pools_mapped() -> int:
    """Memory files of workers that this process maps."""
    return Path("/proc/self/maps").read_text().count("memfd:baton-kv")


def open_files(without: frozenset[str]) -> Counter[str]:
    """What this process has open, numbers left out, and how many of each; some are not counted."""
    names: Counter[str] = Counter()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the folder's own
            names[re.sub(r"\d+", "#", os.readlink(f"/proc/self/fd/{descriptor}"))] += 1
    return Counter({name: count for name, count in names.items() if name not in without})


def start_garbage_thread() -> None:
    """pyzmq has one for buffers that it sends without copying; it starts with the first and stays."""
    with zmq.Context() as context, context.socket(zmq.PUSH) as push, context.socket(zmq.PULL) as pull:
        push.bind("inproc://garbage")
        pull.connect("inproc://garbage")
        push.send(bytearray(2 * zmq.COPY_THRESHOLD), copy=False)
        pull.recv()


class Handoff:
    """Two batchers on a virtual clock; the bytes between them go through the transport."""

    def __init__(self, reader: Side, owner: Peer) -> None:
        self.reader = reader
        self.prefill = Bench("prefill-0", owner.incarnation, num_blocks=NUM_BLOCKS, budget=4096)
        self.prefill.me = self.prefill.batcher.me = owner
        self.decode = Bench("decode-0", reader.peer.incarnation, num_blocks=NUM_BLOCKS, budget=4096)
        self.pulls: list[Pull] = []
        """All that were begun."""
        self.owner_is_gone = False
        """Nothing that is said to it arrives any more."""
        self._transfers = 0
        self._out: list[effects.Effect] = []
        self._gone = ""

    def begin(self, n: int, length: int, gone: str = "", first_token: int = 0) -> int:
        """Prefill and start the decode leg; how many blocks are being pulled."""
        self._gone = gone
        self.prefill.now = self.decode.now  # however many prompts came before
        self.prefill.prefill(n, list(range(first_token, first_token + length)), hand_over=True)
        (done,) = to_scheduler(self.prefill.run(), PrefillDone)
        assert isinstance(done, PrefillDone)
        if gone == "before":
            self.expire()
        moved = self._carry(self.decode.decode(self.prefill, done))
        if gone == "during":
            self.expire()
            self._carry(self._ask_again())
        return moved

    def finish(self) -> list[Ended]:
        """Until nothing moves; the decode leg's ends."""
        while self._transfers:
            for done in self.reader.wait():
                assert done.ok, done.reason
                self._transfers -= 1
                if self._gone == "after" and not self._transfers:
                    self.expire()
                self._carry(self.decode.handle(done))
        if self.owner_is_gone:
            self.decode.now += 60.0
            self.decode.batcher.tick(self.decode.now)
        self._carry(self.decode.run(limit=10 * MANY))
        return [message for message in to_scheduler(self._out, Ended) if isinstance(message, Ended) and message.retry]

    def expire(self) -> None:
        """The owner's lease runs out."""
        self.prefill.now += 60.0
        self.prefill.batcher.tick(self.prefill.now)
        self.prefill.take()

    def _ask_again(self) -> list[effects.Effect]:
        self.decode.now += 1.0
        self.decode.batcher.tick(self.decode.now)
        return self.decode.take()

    def _carry(self, out: list[effects.Effect]) -> int:
        """Deliver messages and start pulls until silence; how many blocks were asked for."""
        moved = 0
        queue = list(out)
        while queue:
            effect = queue.pop(0)
            match effect:
                case effects.ToOwner():
                    queue += [] if self.owner_is_gone else self.prefill.handle(effect.message)
                case effects.ToHolder():
                    queue += self.decode.handle(effect.message)
                case Pull():
                    moved += len(effect.source)
                    self._transfers += 1
                    self.pulls.append(effect)
                    self.reader.sink.start(effect)
                case _:
                    self._out.append(effect)
        return moved
