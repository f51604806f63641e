"""Which program of the attention kernels does what: lists built on the host for each step, as plain integers.

A tile is a run of query tokens of one sequence against a run of its keys. Sequences differ in length, so a grid over
sequences would wait for the longest. Sequences with one query token (decode rows) are cut into tiles of about equal
length; the parts of a row that was cut are put together by a second kernel. Sequences with several query tokens are cut
into tiles of so many of them. Both lists are sorted, longest first.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TILE_FIELDS = 8
"""First query row, its position, number of query rows, block table row, first key, end key, index of the partial result
(-1: the rows are whole), length of the sequence."""
PART_FIELDS = 3
"""Of a row that was cut: the query row, its first partial result, their count (0: no row)."""

PROGRAMS = 528
"""Decode programs (tiles times KV heads) that keep a GPU of 132 multiprocessors evenly busy: 4 for each."""
CUT_TOKENS = 64
"""Rows are cut at multiples of this: the keys that the decode kernel takes at a time."""
MIN_CUT_TOKENS = 128
"""A shorter part costs more to put together than it saves."""


@dataclass(frozen=True, slots=True)
class Lists:
    """One step's tiles for layers with the same window; all int32."""

    decode: np.ndarray
    """[n, TILE_FIELDS] of the sequences with one query token."""
    parts: np.ndarray
    """[rows that were cut, PART_FIELDS]."""
    prefill: np.ndarray
    """[n, TILE_FIELDS] of the sequences with several query tokens."""


def max_decode_tiles(num_rows: int, num_kv_heads: int) -> int:
    """The longest list of tiles that `plan_decode` makes for so many rows."""
    return num_rows + -(-PROGRAMS // num_kv_heads)


def max_cut_rows(num_rows: int, num_kv_heads: int) -> int:
    """How many of them it cuts at most: those as long as 1.5 parts, of which there are PROGRAMS / num_kv_heads."""
    return min(num_rows, 2 * PROGRAMS // (3 * num_kv_heads))


def plan(
    query_start: np.ndarray,
    seq_lens: np.ndarray,
    table_rows: np.ndarray,
    num_kv_heads: int,
    tile_tokens: int,
    windows: Sequence[int] = (0,),
    split_decode: bool = True,
) -> tuple[Lists, ...]:
    """Lists for each of `windows` (keys that a token sees, itself included; 0: all before it).

    query_start [num_seqs + 1], seq_lens and table_rows [num_seqs]; see Ops.paged_attention. Sequences with one query
    are decode rows, or prefill tiles like the others when split_decode is off.
    """
    rows, counts = query_start[:-1], query_start[1:] - query_start[:-1]
    single = (counts == 1) & split_decode
    one, more = np.flatnonzero(single), np.flatnonzero(~single)
    lists = []
    for window in windows:
        decode, parts = plan_decode(rows[one], table_rows[one], seq_lens[one], num_kv_heads, window)
        prefill = plan_prefill(rows[more], table_rows[more], counts[more], seq_lens[more], tile_tokens, window)
        lists.append(Lists(decode, parts, prefill))
    return tuple(lists)


def plan_decode(
    rows: np.ndarray, table_rows: np.ndarray, seq_lens: np.ndarray, num_kv_heads: int, window: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tiles and parts of the decode rows `rows`."""
    if len(rows) == 0:
        return np.zeros((0, TILE_FIELDS), dtype=np.int32), np.zeros((0, PART_FIELDS), dtype=np.int32)
    ends = seq_lens.astype(np.int64)
    begins = _first_seen(ends - 1, window)
    spans = ends - begins
    target = max(MIN_CUT_TOKENS, -(-int(spans.sum()) * num_kv_heads // PROGRAMS))
    cuts = np.maximum(1, (2 * spans + target) // (2 * target))  # to the nearest: 1.4 targets are not worth a cut
    owner, part = _runs(cuts)
    steps = -(-spans // CUT_TOKENS)[owner]
    start = begins[owner] + part * steps // cuts[owner] * CUT_TOKENS
    end = np.minimum(begins[owner] + (part + 1) * steps // cuts[owner] * CUT_TOKENS, ends[owner])
    cut = cuts > 1
    partial_first = np.cumsum(np.where(cut, cuts, 0)) - np.where(cut, cuts, 0)
    partial = np.where(cut[owner], partial_first[owner] + part, -1)
    parts = np.stack([rows[cut], partial_first[cut], cuts[cut]], axis=1).astype(np.int32)
    last = ends[owner] - 1
    return _tiles(rows[owner], last, 1 + 0 * owner, table_rows[owner], start, end, partial, ends[owner]), parts


def plan_prefill(
    first_rows: np.ndarray,
    table_rows: np.ndarray,
    counts: np.ndarray,
    seq_lens: np.ndarray,
    tile_tokens: int,
    window: int = 0,
) -> np.ndarray:
    """Tiles of at most `tile_tokens` queries of one sequence each."""
    owner, tile = _runs(-(-counts // tile_tokens))
    first = tile * tile_tokens
    tokens = np.minimum(counts[owner] - first, tile_tokens)
    position = (seq_lens - counts)[owner] + first
    start = _first_seen(position, window)
    end = position + tokens
    return _tiles(first_rows[owner] + first, position, tokens, table_rows[owner], start, end, -1, seq_lens[owner])


def _first_seen(positions: np.ndarray, window: int) -> np.ndarray:
    return np.maximum(0, positions + 1 - window) if window else 0 * positions


def _runs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For counts [2, 3]: owners [0, 0, 1, 1, 1] and numbers within [0, 1, 0, 1, 2]."""
    owner = np.repeat(np.arange(len(counts)), counts)
    return owner, np.arange(len(owner)) - (np.cumsum(counts) - counts)[owner]


def _tiles(
    row: np.ndarray,
    position: np.ndarray,
    tokens: np.ndarray,
    table: np.ndarray,
    start: np.ndarray,
    end: np.ndarray,
    partial: np.ndarray | int,
    length: np.ndarray,
) -> np.ndarray:
    columns = np.broadcast_arrays(row, position, tokens, table, start, end, partial, length)
    return np.stack(columns, axis=1).astype(np.int32)[np.argsort(start - end, kind="stable")]
