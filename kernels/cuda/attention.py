"""Paged attention over the tiles of work.py, in Triton: split-KV decode and flash attention are one kernel.

Dao et al., 2022 (FlashAttention: online softmax); Flash-Decoding, 2023 (split KV). The query heads that share a KV head
are rows of one matrix product, so that every cached key is read once for all of them. hopper_attention.py has a faster
kernel for prefill where the GPU allows it.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.cuda import pdl

LOG2E = 1.4426950408889634
ROWS = 128
"""Query rows (tokens times heads of one group) of a prefill tile."""


@dataclass(frozen=True)
class Shape:
    """Keys per iteration, warps, and loads in flight of a kernel."""

    keys: int
    warps: int
    stages: int


_SHAPES = {
    ("decode", 2, 128): Shape(keys=64, warps=2, stages=3),
    ("decode", 2, 256): Shape(keys=32, warps=2, stages=3),
    ("decode", 4, 256): Shape(keys=32, warps=8, stages=2),
    ("prefill", 2, 128): Shape(keys=128, warps=8, stages=2),
    ("prefill", 2, 256): Shape(keys=64, warps=8, stages=2),
    ("prefill", 4, 256): Shape(keys=32, warps=8, stages=2),
}
"""By phase, bytes of an element and largest head size; measured on an H200, see docs/performance.md."""


def shape_for(phase: str, query: torch.Tensor) -> Shape:
    """The tuned shape; query [n, num_heads, head_dim]."""
    _, _, dim = query.shape
    size = query.element_size()
    return min((limit, shape) for (p, s, limit), shape in _SHAPES.items() if p == phase and s == size and dim <= limit)[
        1
    ]


@triton.jit
def _attend(
    query,
    base,
    table,
    positions,
    start,
    end,
    query_position,
    column,
    column_ok,
    block_stride,
    scale,
    soft_cap,
    window,
    best,
    total,
    acc,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of keys, at `positions` [N], into the running softmax of query [M, D] at query_position [M]."""
    here = positions < end
    if WINDOWED:
        here = here & (positions >= start)
    blocks = tl.load(table + positions // BLOCK_SIZE, mask=here, other=0).to(tl.int64)
    keys = base + (blocks * block_stride + (positions % BLOCK_SIZE) * HEAD_DIM)[:, None] + column[None, :]
    loaded = here[:, None] & column_ok[None, :] if MASKED else column_ok[None, :]
    key = tl.load(keys, mask=loaded, other=0.0)
    scores = tl.dot(query, tl.trans(key), input_precision=PRECISION)
    if CAPPED:  # tanh(x) = 1 - 2 / (e^2x + 1)
        scores = soft_cap * (1 - 2 / (tl.exp2(scores * (2 * 1.4426950408889634 / soft_cap)) + 1))
    if MASKED:
        visible = here[None, :] & (positions[None, :] <= query_position[:, None])
        if WINDOWED:
            visible = visible & (positions[None, :] > query_position[:, None] - window)
        scores = tl.where(visible, scores, -float("inf"))
    new_best = tl.maximum(best, tl.max(scores, axis=1) * scale)
    # A row that has seen no key yet would give inf - inf.
    shift = tl.where(new_best == -float("inf"), 0.0, new_best) if MASKED else new_best
    # Scaled here, with one rounding: masked or not, a key must weigh the same to the last bit (invariant.py).
    weights = tl.exp2(tl.fma(scores, scale, -shift[:, None]))
    keep = tl.exp2(best - shift)
    total = total * keep + tl.sum(weights, axis=1)
    value = tl.load(keys + BLOCK_SIZE * HEAD_DIM, mask=loaded, other=0.0)
    acc = tl.dot(weights.to(value.dtype), value, acc * keep[:, None], input_precision=PRECISION)
    return new_best, total, acc


@triton.jit(do_not_specialize=["layer", "window"])
def _attention(
    query_ptr,
    pool_ptr,
    tables_ptr,
    tiles_ptr,
    count_ptr,
    out_ptr,
    partial_ptr,
    partial_stats_ptr,
    scale,
    soft_cap,
    layer,
    window,
    query_stride,
    block_stride,
    head_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    TILES_PER_KV: tl.constexpr,
    SINGLE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per HEADS heads and tile; row m is token m // HEADS, head m % HEADS. SINGLE: tiles of one token."""
    head_tile, index = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if index >= tl.load(count_ptr):
        return
    tile = tiles_ptr + index * 8
    row, position, tokens = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    table = tables_ptr + tl.load(tile + 3).to(tl.int64) * table_stride
    start, end = tl.load(tile + 4), tl.load(tile + 5)
    member = tl.arange(0, BLOCK_M)
    column = tl.arange(0, BLOCK_D)
    column_ok = column < HEAD_DIM
    token = member // HEADS
    head = head_tile * HEADS + member % HEADS
    row_ok = token < tokens
    mask = row_ok[:, None] & column_ok[None, :]
    rows = (row + token)[:, None]
    query = tl.load(query_ptr + rows * query_stride + head[:, None] * HEAD_DIM + column[None, :], mask=mask, other=0.0)
    kv_head = (head_tile // TILES_PER_KV).to(tl.int64)
    base = pool_ptr + kv_head * head_stride + layer * 2 * BLOCK_SIZE * HEAD_DIM
    best = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    query_position = position + token
    if WINDOWED and not SINGLE:
        first_step = start // BLOCK_N * BLOCK_N  # wherever a tile starts, its rows add up the same runs of keys
        unmasked_end = first_step
    else:
        first_step = start
        unmasked_end = start + (tl.minimum(end, position + 1) - start) // BLOCK_N * BLOCK_N
    for MASKED in tl.static_range(2):
        begin = unmasked_end if MASKED else first_step
        stop = end if MASKED else unmasked_end
        for first in tl.range(begin, stop, BLOCK_N, num_stages=1 if MASKED and SINGLE else None):
            best, total, acc = _attend(
                query,
                base,
                table,
                first + offsets,
                start,
                end,
                query_position,
                column,
                column_ok,
                block_stride,
                scale,
                soft_cap,
                window,
                best,
                total,
                acc,
                HEAD_DIM,
                BLOCK_SIZE,
                MASKED,
                WINDOWED,
                CAPPED,
                PRECISION,
            )
    acc = acc / total[:, None]
    partial = tl.load(tile + 6)
    if SINGLE and partial >= 0:
        slot = partial.to(tl.int64) * NUM_HEADS + head
        tl.store(partial_ptr + slot[:, None] * HEAD_DIM + column[None, :], acc, mask=mask)
        tl.store(partial_stats_ptr + slot, best + tl.log2(total), mask=row_ok)
    else:
        target = out_ptr + (rows * NUM_HEADS + head[:, None]) * HEAD_DIM + column[None, :]
        tl.store(target, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine(
    partial_ptr,
    partial_stats_ptr,
    parts_ptr,
    out_ptr,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row that was cut and head: its parts, weighted by their shares."""
    index, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.load(parts_ptr + index * 3).to(tl.int64)
    first, count = tl.load(parts_ptr + index * 3 + 1), tl.load(parts_ptr + index * 3 + 2)
    if count == 0:
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


@dataclass(frozen=True, slots=True)
class Problem:
    """What all attention kernels take beside the tiles.

    query [n, num_heads, head_dim] of one step, last axis dense; pool [num_blocks, num_kv_heads, num_layers, 2,
    block_size, head_dim]; tables int32 [rows, max_blocks]; out [n, num_heads * head_dim]; window: keys that a token
    sees, itself included, 0: all; soft_cap: scores become soft_cap * tanh(score / soft_cap), 0: they stay.
    """

    query: torch.Tensor
    pool: torch.Tensor
    layer: int
    tables: torch.Tensor
    out: torch.Tensor
    scale: float
    window: int = 0
    soft_cap: float = 0.0


def head_tile(num_heads: int, num_kv_heads: int) -> int:
    """Heads in a prefill tile: the largest power of two that divides a group."""
    group = num_heads // num_kv_heads
    return min(group & -group, 32)


def tile_tokens(num_heads: int, num_kv_heads: int) -> int:
    """Query tokens in a prefill tile."""
    return ROWS // head_tile(num_heads, num_kv_heads)


def decode(problem: Problem, tiles: torch.Tensor, num_tiles: torch.Tensor, parts: torch.Tensor | None) -> None:
    """Tiles [n, TILE_FIELDS] of one query row each; num_tiles int32 [1] of them count; parts [n, PART_FIELDS] of
    the rows that were cut."""
    query, heads = problem.query, problem.query.shape[1]
    group = heads // problem.pool.shape[1]
    partial = torch.empty(len(tiles), *query.shape[1:], dtype=torch.float32, device=query.device)
    stats = torch.empty(len(tiles), heads, dtype=torch.float32, device=query.device)
    _launch(problem, "decode", tiles, num_tiles, group, max(16, triton.next_power_of_2(group)), partial, stats)
    if parts is None:
        return
    dim = query.shape[2]
    _combine[(len(parts), heads)](
        partial, stats, parts, problem.out, heads, dim, triton.next_power_of_2(dim), num_warps=1, **pdl.options()
    )


def prefill(problem: Problem, tiles: torch.Tensor, num_tiles: torch.Tensor) -> None:
    """Tiles [n, TILE_FIELDS] of tile_tokens query rows; num_tiles int32 [1] of them count, on the device."""
    heads = head_tile(problem.query.shape[1], problem.pool.shape[1])
    _launch(problem, "prefill", tiles, num_tiles, heads, ROWS, problem.out, problem.out)


def _launch(
    problem: Problem,
    phase: str,
    tiles: torch.Tensor,
    num_tiles: torch.Tensor,
    heads: int,
    rows: int,
    partial: torch.Tensor,
    stats: torch.Tensor,
) -> None:
    query, pool = problem.query, problem.pool
    _, num_heads, dim = query.shape
    num_kv_heads, block_size = pool.shape[1], pool.shape[4]
    shape = shape_for(phase, query)
    _attention[(num_heads // heads, len(tiles))](
        query,
        pool,
        problem.tables,
        tiles,
        num_tiles,
        problem.out,
        partial,
        stats,
        problem.scale * LOG2E,
        problem.soft_cap / problem.scale,
        problem.layer,
        problem.window,
        query.stride(0),
        pool.stride(0),
        pool.stride(1),
        problem.tables.stride(0),
        num_heads,
        heads,
        num_heads // num_kv_heads // heads,
        phase == "decode",
        dim,
        block_size,
        rows,
        shape.keys,
        max(16, triton.next_power_of_2(dim)),
        problem.window > 0,
        problem.soft_cap > 0,
        "tf32" if query.element_size() == 2 else "ieee",
        num_warps=shape.warps,
        num_stages=shape.stages,
        **pdl.options(),
    )
