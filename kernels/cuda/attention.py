"""Paged attention as two kernels over work lists (work.py): split-KV decode, and flash attention for query tiles.

Dao et al., 2022 (FlashAttention: online softmax); Flash-Decoding, 2023 (split KV). The query heads that share a KV head
are rows of one matrix product, so that every cached key is read once for all of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Shape:
    """Keys per iteration, warps, and loads in flight of a kernel; prefill also query rows of a tile."""

    keys: int
    warps: int
    stages: int
    rows: int = 128


DECODE = Shape(keys=64, warps=2, stages=3)
PREFILL = Shape(keys=128, warps=8, stages=2)
FLOAT32 = Shape(keys=32, warps=8, stages=2)


@triton.jit
def _load_kv(base, table, positions, valid, column, block_stride, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Pointers to the cached keys of `positions`; values lie BLOCK_SIZE * HEAD_DIM elements further."""
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    return base + (blocks * block_stride + (positions % BLOCK_SIZE) * HEAD_DIM)[:, None] + column[None, :]


@triton.jit
def _attend(
    query, keys, values, visible, column_ok, scale, best, total, acc, MASKED: tl.constexpr, PRECISION: tl.constexpr
):
    """One block of keys into the running softmax. query [M, D]; keys, values: pointers [N, D]; visible [M or 1, N]."""
    if MASKED:
        loaded = (tl.max(visible.to(tl.int32), axis=0) > 0)[:, None] & column_ok[None, :]
        key = tl.load(keys, mask=loaded, other=0.0)
    else:
        key = tl.load(keys, mask=column_ok[None, :], other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, -float("inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1) * scale)
    # A row that has seen no key yet would give inf - inf.
    shift = tl.where(new_best == -float("inf"), 0.0, new_best) if MASKED else new_best
    # Scaled here, with one rounding: masked or not, a key must weigh the same to the last bit (invariant.py).
    weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
    keep = tl.exp2(best - shift)
    total = total * keep + tl.sum(weights, axis=1)
    if MASKED:
        value = tl.load(values, mask=loaded, other=0.0)
    else:
        value = tl.load(values, mask=column_ok[None, :], other=0.0)
    acc = tl.dot(weights.to(value.dtype), value, acc * keep[:, None], input_precision=PRECISION)
    return new_best, total, acc


@triton.jit(do_not_specialize=["layer"])
def _decode(
    query_ptr,
    pool_ptr,
    tables_ptr,
    items_ptr,
    count_ptr,
    out_ptr,
    partial_ptr,
    partial_stats_ptr,
    scale,
    layer,
    query_stride,
    block_stride,
    head_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per KV head and item."""
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    if index >= tl.load(count_ptr):
        return
    item = items_ptr + index * 5
    row = tl.load(item).to(tl.int64)
    table = tables_ptr + tl.load(item + 1).to(tl.int64) * table_stride
    start, end, partial = tl.load(item + 2), tl.load(item + 3), tl.load(item + 4)
    member = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    column_ok = column < HEAD_DIM
    head = kv_head * GROUP + member
    in_group = (member < GROUP)[:, None] & column_ok[None, :]
    query = tl.load(
        query_ptr + row * query_stride + head[:, None] * HEAD_DIM + column[None, :], mask=in_group, other=0.0
    )
    base = pool_ptr + kv_head.to(tl.int64) * head_stride + layer * 2 * BLOCK_SIZE * HEAD_DIM
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    whole = start + (end - start) // BLOCK_N * BLOCK_N
    for first in range(start, whole, BLOCK_N):
        positions = first + offsets
        keys = _load_kv(base, table, positions, positions < end, column, block_stride, BLOCK_SIZE, HEAD_DIM)
        visible = (positions < end)[None, :]
        best, total, acc = _attend(
            query, keys, keys + BLOCK_SIZE * HEAD_DIM, visible, column_ok, scale, best, total, acc, False, PRECISION
        )
    if whole < end:
        positions = whole + offsets
        keys = _load_kv(base, table, positions, positions < end, column, block_stride, BLOCK_SIZE, HEAD_DIM)
        visible = (positions < end)[None, :]
        best, total, acc = _attend(
            query, keys, keys + BLOCK_SIZE * HEAD_DIM, visible, column_ok, scale, best, total, acc, True, PRECISION
        )
    acc = acc / total[:, None]
    if partial < 0:
        target = out_ptr + (row * NUM_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=in_group)
    else:
        slot = partial.to(tl.int64) * NUM_HEADS + head
        tl.store(partial_ptr + slot[:, None] * HEAD_DIM + column[None, :], acc, mask=in_group)
        tl.store(partial_stats_ptr + slot, best + tl.log2(total), mask=member < GROUP)


@triton.jit
def _combine(
    partial_ptr,
    partial_stats_ptr,
    parts_ptr,
    out_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program per query row and head: the parts of a row that was cut, weighted by their shares."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, count = tl.load(parts_ptr + row * 2), tl.load(parts_ptr + row * 2 + 1)
    if count < 2:
        return
    column = tl.arange(0, BLOCK_D)
    column_ok = column < HEAD_DIM
    best = -float("inf")
    total = 0.0
    acc = tl.zeros([BLOCK_D], tl.float32)
    for part in range(count):
        slot = (first + part).to(tl.int64) * NUM_HEADS + head
        stat = tl.load(partial_stats_ptr + slot)
        new_best = tl.maximum(best, stat)
        keep, weight = tl.exp2(best - new_best), tl.exp2(stat - new_best)
        acc = acc * keep + tl.load(partial_ptr + slot * HEAD_DIM + column, mask=column_ok, other=0.0) * weight
        total = total * keep + weight
        best = new_best
    target = out_ptr + (row * NUM_HEADS + head) * HEAD_DIM + column
    tl.store(target, (acc / total).to(out_ptr.dtype.element_ty), mask=column_ok)


@triton.jit(do_not_specialize=["layer"])
def _prefill(
    query_ptr,
    pool_ptr,
    tables_ptr,
    tiles_ptr,
    count_ptr,
    out_ptr,
    scale,
    layer,
    query_stride,
    block_stride,
    head_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per KV head and tile; row m of the tile is token m // GROUP, member m % GROUP of the head's group."""
    kv_head = tl.program_id(0)
    index = tl.program_id(1)
    if index >= tl.load(count_ptr):
        return
    tile = tiles_ptr + index * 6
    first_row = tl.load(tile).to(tl.int64)
    table = tables_ptr + tl.load(tile + 1).to(tl.int64) * table_stride
    first_query, count, length = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4)
    rows = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    column_ok = column < HEAD_DIM
    token = first_query + rows // GROUP
    head = kv_head * GROUP + rows % GROUP
    row_ok = (token < count) & (rows < TILE_TOKENS * GROUP)
    mask = row_ok[:, None] & column_ok[None, :]
    where = (first_row + token)[:, None]
    query = tl.load(query_ptr + where * query_stride + head[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
    base = pool_ptr + kv_head.to(tl.int64) * head_stride + layer * 2 * BLOCK_SIZE * HEAD_DIM
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    position = length - count + token  # of each row
    seen_by_all = (length - count + first_query + 1) // BLOCK_N * BLOCK_N
    end = tl.minimum(length, length - count + first_query + TILE_TOKENS)
    for first in range(0, seen_by_all, BLOCK_N):
        keys_at = first + offsets
        keys = _load_kv(base, table, keys_at, keys_at < length, column, block_stride, BLOCK_SIZE, HEAD_DIM)
        visible = (keys_at < length)[None, :]
        best, total, acc = _attend(
            query, keys, keys + BLOCK_SIZE * HEAD_DIM, visible, column_ok, scale, best, total, acc, False, PRECISION
        )
    for first in range(seen_by_all, end, BLOCK_N):
        keys_at = first + offsets
        keys = _load_kv(base, table, keys_at, keys_at < length, column, block_stride, BLOCK_SIZE, HEAD_DIM)
        visible = (keys_at[None, :] <= position[:, None]) & (keys_at < length)[None, :]
        best, total, acc = _attend(
            query, keys, keys + BLOCK_SIZE * HEAD_DIM, visible, column_ok, scale, best, total, acc, True, PRECISION
        )
    target = out_ptr + (where * NUM_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
    tl.store(target, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def tile_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Query tokens in one tile of the prefill kernel."""
    return max(1, PREFILL.rows // (num_heads // num_kv_heads))


def decode(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    items: torch.Tensor,
    num_items: torch.Tensor,
    parts: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """Rows of `query` named by `items` [n, 5] into `out`; num_items int32 [1] of them count, on the device."""
    _, heads, dim = query.shape
    kv_heads, block_size = pool.shape[1], pool.shape[4]
    partial = torch.empty(len(items), heads, dim, dtype=torch.float32, device=query.device)
    stats = torch.empty(len(items), heads, dtype=torch.float32, device=query.device)
    small = query.element_size() == 2
    shape = DECODE if small else FLOAT32
    _decode[(kv_heads, len(items))](
        query,
        pool,
        tables,
        items,
        num_items,
        out,
        partial,
        stats,
        scale * _LOG2E,
        layer,
        query.stride(0),
        pool.stride(0),
        pool.stride(1),
        tables.stride(0),
        heads,
        heads // kv_heads,
        dim,
        block_size,
        max(16, triton.next_power_of_2(heads // kv_heads)),
        shape.keys,
        max(16, triton.next_power_of_2(dim)),
        "tf32" if small else "ieee",
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
    _combine[(len(parts), heads)](
        partial, stats, parts, out, heads, dim, max(16, triton.next_power_of_2(dim)), num_warps=1
    )


def prefill(
    query: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    tables: torch.Tensor,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    out: torch.Tensor,
    scale: float,
) -> None:
    """The query tiles `tiles` [n, 6] into `out`; num_tiles int32 [1] of them count, on the device."""
    _, heads, dim = query.shape
    kv_heads, block_size = pool.shape[1], pool.shape[4]
    tokens = tile_tokens(heads, kv_heads)
    small = query.element_size() == 2
    shape = PREFILL if small and dim <= 128 else FLOAT32
    rows = max(16, triton.next_power_of_2(tokens * (heads // kv_heads)))
    _prefill[(kv_heads, len(tiles))](
        query,
        pool,
        tables,
        tiles,
        num_tiles,
        out,
        scale * _LOG2E,
        layer,
        query.stride(0),
        pool.stride(0),
        pool.stride(1),
        tables.stride(0),
        heads,
        heads // kv_heads,
        tokens,
        dim,
        block_size,
        rows,
        shape.keys,
        max(16, triton.next_power_of_2(dim)),
        "tf32" if small else "ieee",
        num_warps=shape.warps,
        num_stages=shape.stages,
    )
