"""Which program of the attention kernels does what: lists built on the host for each step, as plain integers.

Sequences differ in length, so a grid over sequences would wait for the longest. Decode rows are cut into items of about
equal length, longest first; the parts of a row that was cut are put together by a second kernel. Rows with several
query tokens are cut into tiles of queries.
"""

from dataclasses import dataclass

import numpy as np

ITEM_FIELDS = 5
"""query row, block table row, first token, end token, index of the partial result (-1: the row is whole)."""
PART_FIELDS = 2
"""Per query row: first partial result, count (0 or 1: nothing to put together)."""
TILE_FIELDS = 6
"""first query row of the sequence, block table row, first query of the tile, query count, sequence length, unused."""

PROGRAMS = 528
"""Decode programs (items times KV heads) that keep a GPU of 132 multiprocessors evenly busy: 4 for each."""
CUT_TOKENS = 64
"""Rows are cut at multiples of this: the keys that the decode kernel takes at a time."""
MIN_ITEM_TOKENS = 128
"""A shorter item costs more to put together than it saves."""


@dataclass(frozen=True, slots=True)
class Work:
    """One step's lists; all int32."""

    items: np.ndarray
    """[num_items, ITEM_FIELDS], longest first."""
    parts: np.ndarray
    """[num_query_rows, PART_FIELDS]; zeros for rows that decode does not compute."""
    tiles: np.ndarray
    """[num_tiles, TILE_FIELDS], most keys first."""


def max_items(num_rows: int, num_kv_heads: int) -> int:
    """The longest list that `plan_decode` makes for so many rows."""
    return num_rows + -(-PROGRAMS // num_kv_heads)


def plan(
    query_start: np.ndarray,
    seq_lens: np.ndarray,
    table_rows: np.ndarray,
    num_kv_heads: int,
    tile_tokens: int,
    split_decode: bool = True,
) -> Work:
    """query_start [num_seqs + 1], seq_lens and table_rows [num_seqs]; see Ops.paged_attention.

    Sequences with one query become items, or tiles like the others when split_decode is off.
    """
    counts = query_start[1:] - query_start[:-1]
    single = (counts == 1) & split_decode
    items, parts = plan_decode(
        query_start[:-1][single], table_rows[single], seq_lens[single], int(query_start[-1]), num_kv_heads
    )
    several = np.flatnonzero(~single)
    tiles = plan_tiles(query_start[:-1][several], table_rows[several], counts[several], seq_lens[several], tile_tokens)
    return Work(items, parts, tiles)


def plan_decode(
    rows: np.ndarray, table_rows: np.ndarray, seq_lens: np.ndarray, num_rows: int, num_kv_heads: int
) -> tuple[np.ndarray, np.ndarray]:
    """Items and parts of the decode rows `rows`, among `num_rows` query rows."""
    parts = np.zeros((num_rows, PART_FIELDS), dtype=np.int32)
    if len(rows) == 0:
        return np.zeros((0, ITEM_FIELDS), dtype=np.int32), parts
    lengths = seq_lens.astype(np.int64)
    target = max(MIN_ITEM_TOKENS, -(-int(lengths.sum()) * num_kv_heads // PROGRAMS))
    cuts = np.maximum(1, (2 * lengths + target) // (2 * target))  # to the nearest: 1.4 targets are not worth a cut
    first = np.cumsum(cuts) - cuts
    owner = np.repeat(np.arange(len(rows)), cuts)
    blocks, part = -(-lengths // CUT_TOKENS), np.arange(len(owner)) - first[owner]
    start = part * blocks[owner] // cuts[owner] * CUT_TOKENS
    end = np.minimum((part + 1) * blocks[owner] // cuts[owner] * CUT_TOKENS, lengths[owner])
    cut = cuts > 1
    partial_first = np.cumsum(np.where(cut, cuts, 0)) - np.where(cut, cuts, 0)
    partial = np.where(cut[owner], partial_first[owner] + part, -1)
    items = np.stack([rows[owner], table_rows[owner], start, end, partial], axis=1).astype(np.int32)
    parts[rows[cut], 0], parts[rows[cut], 1] = partial_first[cut], cuts[cut]
    return items[np.argsort(start - end, kind="stable")], parts


def plan_tiles(
    first_rows: np.ndarray, table_rows: np.ndarray, counts: np.ndarray, seq_lens: np.ndarray, tile_tokens: int
) -> np.ndarray:
    """Tiles of at most `tile_tokens` queries of one sequence each."""
    per_seq = -(-counts // tile_tokens)
    owner = np.repeat(np.arange(len(counts)), per_seq)
    tile = np.arange(len(owner)) - (np.cumsum(per_seq) - per_seq)[owner]
    columns = [first_rows[owner], table_rows[owner], tile * tile_tokens, counts[owner], seq_lens[owner], 0 * owner]
    tiles = np.stack(columns, axis=1).astype(np.int32)
    keys = seq_lens[owner] - counts[owner] + (tile + 1) * tile_tokens
    return tiles[np.argsort(-keys, kind="stable")]
