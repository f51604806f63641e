"""The pulls from one peer in pieces: their sizes, what is under way at once, and when each pull is answered."""

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from baton.kv_transfer.contract import MAX_PIECE_BLOCKS, Pool, Pull, TransferError, blocks_per_piece
from baton.kv_transfer.fetch import PACKET_BYTES, encode_fetch
from baton.kv_transfer.pipeline import Pipeline, piece_size
from baton.kv_transfer.shm import ShmLink
from baton.proto.layout import Group, KVLayout
from baton.proto.messages import Peer
from baton.worker.kv_pool import HostPool

OWNER = Peer("prefill-0", 1, "", "")
GROUP = Group("full", 1, 16, 128, ("words",), (32,), "float32")
LAYOUT = KVLayout("model", (GROUP,))
OWNERS, OURS = 500, 600


class Watched(ShmLink):
    """Small pieces out of an owner's memory, and what was done with them."""

    piece_bytes = 8 * GROUP.block_bytes
    edge_bytes = GROUP.block_bytes
    window = 3

    def __init__(self, pool: Pool, memfd: int) -> None:
        super().__init__(pool, memfd)
        self.indices: list[int] = []
        self.pieces: list[int] = []
        self.last: list[bool] = []
        self.under_way: list[int] = []
        self.most_under_way = 0
        self.ended = 0

    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        super().begin(index, source, target, last)
        self.indices.append(index)
        self.under_way.append(index)
        self.pieces.append(len(source))
        self.last.append(last)
        self.most_under_way = max(self.most_under_way, len(self.under_way))

    def end(self, index: int, target: np.ndarray) -> None:
        super().end(index, target)
        assert index == self.under_way.pop(0)
        self.ended += len(target)


class Pair:
    """An owner's memory, ours, and the link between them."""

    def __init__(self) -> None:
        self.theirs, self.ours = HostPool(LAYOUT, OWNERS), HostPool(LAYOUT, OURS)
        self.theirs.tensor[:, 0] = torch.arange(OWNERS)
        self.ours.tensor.fill_(-1)
        self.link = Watched(self.ours.blocks, self.theirs.memfd)
        self.pipeline = Pipeline(self.link, GROUP.block_bytes, OWNERS)

    def copy(self, *waiting: Pull | None) -> list[tuple[int, int]]:
        """Pulls in the order of their answers, and how many blocks had ended by then. None: just then nobody waits."""
        pulls = iter(waiting)
        return [(each.transfer, self.link.ended) for each in self.pipeline.copy(lambda: next(pulls, None))]

    def close(self) -> None:
        self.link.close()
        self.theirs.close()
        self.ours.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    pair = Pair()
    yield pair
    pair.close()


def pull(transfer: int, first: int, count: int) -> Pull:
    """To the same places."""
    return Pull(transfer, OWNER, np.arange(first, first + count), np.arange(first, first + count))


def sizes(count: int, most: int, edge: int) -> list[int]:
    found, left = [], count
    while left:
        found.append(piece_size(left, found[-1] if found else 0, edge, most))
        left -= found[-1]
    return found


@pytest.mark.parametrize(
    ("count", "most", "edge", "expected"),
    [
        (1, 8, 1, [1]),
        (2, 8, 1, [1, 1]),
        (4, 8, 1, [1, 2, 1]),
        (20, 8, 1, [1, 2, 4, 8, 3, 1, 1]),
        (50, 8, 1, [1, 2, 4, *[8] * 4, 7, 2, 1, 1]),
        (20, 8, 8, [8, 8, 4]),
        (8, 8, 8, [8]),
        (11, 8, 8, [8, 3]),
        (9, 8, 6, [8, 1]),
    ],
)
def test_a_stretch_begins_and_ends_with_small_pieces(count: int, most: int, edge: int, expected: list[int]) -> None:
    assert sizes(count, most, edge) == expected


def test_pieces_are_bounded_and_all_blocks_go() -> None:
    for count, most, edge in itertools.product(range(1, 200), (1, 2, 7, 8), (1, 2, 5, 8)):
        found = sizes(count, most, min(edge, most))
        assert sum(found) == count
        assert 0 < min(found) <= max(found) <= most


def test_every_block_arrives_and_no_more_than_the_window_are_under_way(pair: Pair) -> None:
    answered = pair.copy(pull(1, 0, 5), pull(2, 5, 60), None, pull(3, 100, 1))
    assert [transfer for transfer, _ in answered] == [1, 2, 3]
    arrived = {int(i) for i in pair.ours.tensor[:, 0].flatten().tolist() if i >= 0}
    assert arrived == {*range(65), 100}
    assert all(pair.ours.tensor[i, 0] == i for i in arrived)
    assert pair.link.most_under_way == pair.link.window
    assert max(pair.link.pieces) == 8


def test_a_pull_is_answered_with_its_last_piece_and_not_with_the_last_of_all(pair: Pair) -> None:
    assert pair.copy(pull(1, 0, 3), pull(2, 3, 100)) == [(1, 3), (2, 103)]


def test_what_comes_meanwhile_goes_behind_what_is_under_way_without_a_new_begin(pair: Pair) -> None:
    pair.copy(pull(1, 0, 14), None, pull(2, 14, 14))
    assert pair.link.pieces[:4] == [1, 2, 4, 8]


def test_a_small_pull_does_not_make_the_next_one_crawl(pair: Pair) -> None:
    pair.link.edge_bytes = pair.link.piece_bytes
    pair.pipeline = Pipeline(pair.link, GROUP.block_bytes, OWNERS)
    pair.copy(pull(1, 0, 1), None, pull(2, 1, 32))
    assert pair.link.pieces == [1, 8, 8, 8, 8]


def test_it_begins_anew_with_a_small_piece_when_nothing_was_under_way_and_counts_on(pair: Pair) -> None:
    pair.copy(pull(1, 0, 30))
    begun = len(pair.link.pieces)
    pair.copy(pull(2, 30, 30))
    assert pair.link.pieces[begun:] == pair.link.pieces[:begun]
    assert pair.link.pieces[begun : begun + 3] == [1, 2, 4]
    assert pair.link.indices == list(range(2 * begun))


def test_no_more_is_asked_for_than_the_next_pieces_need(pair: Pair) -> None:
    """What is still with the caller when it has to stop is not copied."""
    asked: list[int] = []

    def next_pull() -> Pull:
        asked.append(len(asked))
        return pull(asked[-1], 0, 8)

    copying = pair.pipeline.copy(next_pull)
    assert next(copying).transfer == 0
    assert len(asked) <= pair.link.window + 3


class Breaks(Watched):
    """Fails at the beginning or at the end of a piece."""

    begins, ends = True, False

    def begin(self, index: int, source: np.ndarray, target: np.ndarray, last: bool) -> None:
        if self.begins and index == 2:
            raise TransferError("it breaks")
        super().begin(index, source, target, last)

    def end(self, index: int, target: np.ndarray) -> None:
        if self.ends and index == 2:
            raise TransferError("it breaks")
        super().end(index, target)


@pytest.mark.parametrize("when", ["begin", "end"])
def test_what_was_whole_before_a_failure_has_been_answered(when: str, pair: Pair) -> None:
    link = Breaks(pair.ours.blocks, pair.theirs.memfd)
    link.window, link.begins, link.ends = 1, when == "begin", when == "end"
    pulls = iter([pull(1, 0, 1), pull(2, 1, 20)])
    copying = Pipeline(link, GROUP.block_bytes, OWNERS).copy(lambda: next(pulls, None))
    assert next(copying).transfer == 1
    with pytest.raises(TransferError, match="it breaks"):
        next(copying)
    link.close()


def test_the_last_piece_is_named_as_such(pair: Pair) -> None:
    pair.copy(pull(1, 0, 14), pull(2, 14, 14))
    assert pair.link.last == [False] * (len(pair.link.last) - 1) + [True]


@pytest.mark.parametrize("block", [OWNERS, -1])
def test_a_block_that_the_owner_does_not_have_is_not_read(block: int, pair: Pair) -> None:
    with pytest.raises(TransferError, match=f"block {block} is beyond the owner's pool of {OWNERS}"):
        pair.copy(Pull(1, OWNER, np.array([0, block]), np.array([1, 2])))
    assert (pair.ours.tensor[2] == -1).all()


def test_a_piece_is_bounded_in_bytes_and_fits_into_a_packet() -> None:
    assert blocks_per_piece(2**20, 4 * 2**20) == 4
    assert blocks_per_piece(2**20, 1) == 1
    assert blocks_per_piece(64, 2**30) == MAX_PIECE_BLOCKS
    assert len(encode_fetch(np.full(MAX_PIECE_BLOCKS, 2**20 - 1))) < PACKET_BYTES
