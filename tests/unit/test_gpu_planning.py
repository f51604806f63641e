"""What a GPU step is planned like, without a GPU: attention's work lists, and which worker gets which GPU."""

import argparse
import random

import numpy as np
import pytest

from baton.frontend.cli import engine_args
from baton.kernels.cuda import work
from baton.proto.lifecycle import Role


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("count", [1, 7, 300])
def test_items_cover_every_decode_row_once(kv_heads: int, count: int) -> None:
    lengths = np.array([random.choice((1, 63, 64, 700, 9000)) for _ in range(count)])
    rows, tables = np.arange(count) * 2, np.arange(count) + 5
    items, parts = work.plan_decode(rows, tables, lengths, 2 * count, kv_heads)
    assert len(items) <= work.max_items(count, kv_heads)
    assert (np.diff(items[:, 3] - items[:, 2]) <= 0).all()
    for index in range(count):
        mine = items[items[:, 0] == rows[index]]
        mine = mine[np.argsort(mine[:, 2])]
        assert (mine[:, 1] == tables[index]).all()
        assert mine[0, 2] == 0
        assert mine[-1, 3] == lengths[index]
        assert (mine[1:, 2] == mine[:-1, 3]).all()
        assert (mine[:, 2] < mine[:, 3]).all()
        first, cuts = parts[rows[index]]
        assert mine[:, 4].tolist() == (list(range(first, first + cuts)) if cuts else [-1])


def test_tiles_cover_every_query_once() -> None:
    counts, lengths = np.array([100, 2, 33]), np.array([100, 900, 40])
    first_rows = np.array([0, 100, 102])
    tiles = work.plan_tiles(first_rows, np.arange(3), counts, lengths, 32)
    covered = [
        first + query
        for first, _, start, count, _, _ in tiles.tolist()
        for query in range(start, min(start + 32, count))
    ]
    assert sorted(covered) == list(range(135))


def test_rows_that_must_not_be_split_are_tiles() -> None:
    """What --batch-invariant asks for: a decode row is computed as the same token of a prompt would be."""
    starts, lengths = np.array([0, 1, 41, 42]), np.array([900, 40, 3000])
    lists = work.plan(starts, lengths, np.arange(3), 8, 32, split_decode=False)
    assert len(lists.items) == 0
    assert sorted(lists.tiles[:, 0].tolist()) == [0, 1, 1, 41]


def options(**given: object) -> argparse.Namespace:
    return argparse.Namespace(**{"device": "cuda", "gpus": None, **given})


def test_workers_take_the_gpus_in_turn() -> None:
    unified = [Role.UNIFIED] * 3
    assert [place.gpu for place in engine_args.place_on_gpus(options(), unified)] == [0, 1, 2]
    assert [place.gpu for place in engine_args.place_on_gpus(options(gpus=(4, 6)), unified)] == [4, 6, 4]
    assert engine_args.place_on_gpus(options(device="cpu"), unified) == [engine_args.GpuPlace()] * 3
    with pytest.raises(argparse.ArgumentTypeError):
        engine_args.gpu_list("0,0")


def test_workers_on_one_gpu_divide_its_memory() -> None:
    roles = [Role.PREFILL, Role.DECODE, Role.DECODE]
    prefill, decode, alone = engine_args.place_on_gpus(options(gpus=(2, 5)), [roles[0], roles[1], roles[2]])
    assert (prefill.gpu, decode.gpu, alone.gpu) == (2, 5, 2)
    assert (decode.gpu_workers, decode.gpu_kv_share) == (1, 1.0)
    assert (prefill.gpu_workers, alone.gpu_workers) == (2, 2)
    assert prefill.gpu_kv_share == 0.25
    assert alone.gpu_kv_share == 0.75
