"""What a GPU step is planned like, without a GPU: attention's work lists, and which worker gets which GPU."""

import argparse
import random

import numpy as np
import pytest

from baton.frontend.cli import engine_args
from baton.kernels.cuda import work

ROW, POSITION, TOKENS, TABLE, START, END, PARTIAL, LENGTH = range(work.TILE_FIELDS)


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 7, 300])
@pytest.mark.parametrize("window", [0, 1, 500])
def test_decode_tiles_cover_what_every_row_sees_once(kv_heads: int, count: int, window: int) -> None:
    lengths = np.array([random.choice((1, 63, 64, 700, 9000)) for _ in range(count)])
    rows, tables = np.arange(count) * 2, np.arange(count) + 5
    tiles, parts = work.plan_decode(rows, tables, lengths, kv_heads, window)
    assert len(tiles) <= work.max_decode_tiles(count, kv_heads)
    assert len(parts) <= work.max_cut_rows(count, kv_heads)
    parts_of = {row: (first, cuts) for row, first, cuts in parts.tolist()}
    assert (np.diff(tiles[:, END] - tiles[:, START]) <= 0).all()
    for index, length in enumerate(lengths.tolist()):
        mine = tiles[tiles[:, ROW] == rows[index]]
        mine = mine[np.argsort(mine[:, START])]
        assert (mine[:, [POSITION, TOKENS, TABLE, LENGTH]] == (length - 1, 1, tables[index], length)).all()
        assert mine[0, START] == (max(0, length - window) if window else 0)
        assert mine[-1, END] == length
        assert (mine[1:, START] == mine[:-1, END]).all()
        assert (mine[:, START] < mine[:, END]).all()
        first, cuts = parts_of.get(rows[index], (0, 0))
        assert mine[:, PARTIAL].tolist() == (list(range(first, first + cuts)) if cuts else [-1])


@pytest.mark.parametrize("kv_heads", [1, 3, 8, 128])
def test_no_lengths_cut_more_rows_than_there_is_room_for(kv_heads: int) -> None:
    for count in (1, 2, 43, 44, 45, 66, 67, 352, 353, 600):
        for length in (128, 191, 192, 193, 1000, 100_000):
            lengths = np.full(count, length)
            tiles, parts = work.plan_decode(np.arange(count), np.arange(count), lengths, kv_heads)
            assert len(tiles) <= work.max_decode_tiles(count, kv_heads)
            assert len(parts) <= work.max_cut_rows(count, kv_heads)


@pytest.mark.parametrize("window", [0, 20])
def test_prefill_tiles_cover_every_query_once(window: int) -> None:
    counts, lengths = np.array([100, 2, 33]), np.array([100, 900, 40])
    first_rows = np.array([0, 100, 102])
    tiles = work.plan_prefill(first_rows, np.arange(3), counts, lengths, 32, window)
    assert sorted(row + i for row, tokens in tiles[:, [ROW, TOKENS]].tolist() for i in range(tokens)) == list(
        range(135)
    )
    assert (np.diff(tiles[:, END] - tiles[:, START]) <= 0).all()
    for tile in tiles:
        sequence = tile[TABLE]
        assert tile[LENGTH] == lengths[sequence]
        assert tile[POSITION] == lengths[sequence] - counts[sequence] + tile[ROW] - first_rows[sequence]
        assert tile[START] == (max(0, tile[POSITION] + 1 - window) if window else 0)
        assert tile[END] == tile[POSITION] + tile[TOKENS]


def test_each_window_has_its_own_lists() -> None:
    starts, lengths = np.array([0, 1, 51]), np.array([1000, 800])
    full, near = work.plan(starts, lengths, np.arange(2), num_kv_heads=8, tile_tokens=32, windows=(0, 100))
    assert full.decode[:, START].min() == 0
    assert near.decode[:, START].min() == 900
    assert near.prefill[:, START].min() == 651
    assert len(full.prefill) == len(near.prefill) == 2


def test_rows_that_must_not_be_split_are_tiles() -> None:
    """What --batch-invariant asks for: a decode row is computed as the same token of a prompt would be."""
    starts, lengths = np.array([0, 1, 41, 42]), np.array([900, 40, 3000])
    (lists,) = work.plan(starts, lengths, np.arange(3), 8, 32, split_decode=False)
    assert len(lists.decode) == 0
    assert sorted(lists.prefill[:, ROW].tolist()) == [0, 1, 33, 41]


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cuda", "gpus": None, **given})


def test_workers_take_the_gpus_in_turn() -> None:
    assert engine_args.gpus_of(options(), 3) == [0, 1, 2]
    assert engine_args.gpus_of(options(gpus=(4, 6)), 3) == [4, 6, 4]
    assert engine_args.gpus_of(options(device="cpu"), 3) == [0, 0, 0]
    with pytest.raises(argparse.ArgumentTypeError):
        engine_args.gpu_list("0,0")
