"""Prefill attention for Hopper in Gluon: warp specialised, keys and values by TMA straight from their paged blocks.

Shah et al., 2024 (FlashAttention-3). One warp of a program fetches, two groups of four compute 64 query rows each:

    fetch:    queries, keys and values of one step after the other into rings of shared memory, one copy per block
    compute:  on the tensor cores the scores of step i run beside the weighted values of step i - 1, and beside both the
              softmax of the other group

There are as many programs as multiprocessors. They take tiles from the sorted list (work.py) back and forth, so that
everyone gets long and short ones: the grid is fixed, and the number of tiles may stay on the device.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from baton.kernels.cuda.attention import LOG2E, ROWS, Problem, head_tile

_COLUMNS = 64
"""16-bit elements in a row of shared memory that TMA and wgmma swizzle as one."""


@gluon.jit
def _tile_index(turn):
    """The tile of this program's `turn`: forth in even turns, back in odd ones."""
    program, programs = gl.program_id(0), gl.num_programs(0)
    return turn * programs + gl.where(turn % 2 == 0, program, programs - 1 - program)


@gluon.jit
def _fetch(
    lists,
    buffers,
    barriers,
    query_desc,
    pool_desc,
    place,
    NUM_HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    LAYERS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    WINDOWED: gl.constexpr,
):
    """The fetching warp. A copy has BOX tokens and 64 columns: shared memory is [columns / 64, tokens, 64]."""
    tiles_ptr, count_ptr = lists
    tables_ptr, table_stride, layer = place
    query_smem, key_smem, value_smem = buffers
    query_full, query_free, key_full, key_free, value_full, value_free = barriers
    QUERIES: gl.constexpr = query_smem.shape[0] // 2
    STAGES: gl.constexpr = key_smem.shape[0]
    KEYS: gl.constexpr = key_smem.shape[1]
    DIM: gl.constexpr = key_smem.shape[2]
    PARTS: gl.constexpr = DIM // 64
    TOKENS: gl.constexpr = query_desc.block_type.shape[0]
    HEADS: gl.constexpr = query_desc.block_type.shape[1]
    BOX: gl.constexpr = pool_desc.block_type.shape[0]
    BOXES: gl.constexpr = KEYS // BOX
    HEAD_TILES: gl.constexpr = NUM_HEADS // HEADS
    dtype: gl.constexpr = pool_desc.dtype
    box_layout: gl.constexpr = pool_desc.layout
    query_layout: gl.constexpr = query_desc.layout
    total = gl.load(count_ptr) * HEAD_TILES
    served, done = 0, 0
    for turn in range(gl.cdiv(total, gl.num_programs(0))):
        index = _tile_index(turn)
        if index < total:
            tile = tiles_ptr + index // HEAD_TILES * 8
            head_tile = index % HEAD_TILES
            row, start, end, length = gl.load(tile), gl.load(tile + 4), gl.load(tile + 5), gl.load(tile + 7)
            table = tables_ptr + gl.load(tile + 3).to(gl.int64) * table_stride
            head_row = ((head_tile // (HEAD_TILES // KV_HEADS)) * LAYERS + layer) * 2 * BLOCK_SIZE
            last = gl.cdiv(end, KEYS) - 1
            for step in range(last + 1 - start // KEYS):
                first = (last - step) * KEYS
                rows = ()
                for box in gl.static_range(BOXES):
                    position = first + box * BOX
                    block = gl.load(table + position // BLOCK_SIZE, mask=position < length, other=0)
                    pool_row = block * (KV_HEADS * LAYERS * 2 * BLOCK_SIZE) + head_row + position % BLOCK_SIZE
                    if WINDOWED:  # what lies wholly before the window is not read: rows before the pool come as zeros
                        pool_row = gl.where(position < start // BOX * BOX, -BLOCK_SIZE - BOX, pool_row)
                    rows = rows + (pool_row,)  # type: ignore[assignment]  # noqa: RUF005
                stage, phase = done % STAGES, done // STAGES & 1 ^ 1
                keys = key_smem.index(stage)._reinterpret(dtype, [PARTS * BOXES, BOX, 64], box_layout)
                values = value_smem.index(stage)._reinterpret(dtype, [PARTS * BOXES, BOX, 64], box_layout)
                keys_in, values_in = key_full.index(stage), value_full.index(stage)
                mbarrier.wait(key_free.index(stage), phase)
                mbarrier.expect(keys_in, KEYS * DIM * 2)
                for part in gl.static_range(PARTS):
                    for box in gl.static_range(BOXES):
                        key_at = [rows[box], part * 64]
                        tma.async_copy_global_to_shared(pool_desc, key_at, keys_in, keys.index(part * BOXES + box))
                if step == 0:
                    slot = served % QUERIES
                    query_in = query_full.index(slot)
                    mbarrier.wait(query_free.index(slot), served // QUERIES & 1 ^ 1)
                    mbarrier.expect(query_in, 2 * 64 * DIM * 2)
                    for half in gl.static_range(2):
                        boxes = query_smem.index(slot * 2 + half)._reinterpret(
                            dtype, [PARTS, TOKENS, HEADS, 64], query_layout
                        )
                        for part in gl.static_range(PARTS):
                            query_at = [row + half * TOKENS, head_tile * HEADS, part * 64]
                            tma.async_copy_global_to_shared(query_desc, query_at, query_in, boxes.index(part))
                mbarrier.wait(value_free.index(stage), phase)
                mbarrier.expect(values_in, KEYS * DIM * 2)
                for part in gl.static_range(PARTS):
                    for box in gl.static_range(BOXES):
                        value_at = [rows[box] + BLOCK_SIZE, part * 64]
                        tma.async_copy_global_to_shared(
                            pool_desc, value_at, values_in, values.index(part * BOXES + box)
                        )
                done += 1
            served += 1


@gluon.jit
def _softmax(
    scores,
    best,
    total,
    first,
    position,
    scale,
    soft_cap,
    window,
    lowest,
    HEADS: gl.constexpr,
    WINDOWED: gl.constexpr,
    CAPPED: gl.constexpr,
):
    """Weights [64, KEYS] of the keys from `first` on; the running best and total [64] and the factor for what was."""
    KEYS: gl.constexpr = scores.shape[1]
    layout: gl.constexpr = scores.type.layout
    if CAPPED:  # tanh(x) = 1 - 2 / (e^2x + 1)
        scores = soft_cap * (1 - 2 / (gl.exp2(scores * (2 * 1.4426950408889634 / soft_cap)) + 1))
    masked = first + KEYS > lowest + 1
    if WINDOWED:
        masked = masked | (first <= lowest + 63 // HEADS - window)
    if masked:
        key = first + gl.arange(0, KEYS, gl.SliceLayout(0, layout))
        visible = key[None, :] <= position[:, None]
        if WINDOWED:
            visible = visible & (key[None, :] > position[:, None] - window)
        scores = gl.where(visible, scores, -float("inf"))
    new_best = gl.maximum(best, gl.max(scores, axis=1) * scale)
    # A row that has seen no key yet would give inf - inf.
    shift = gl.where(new_best == -float("inf"), 0.0, new_best)
    weights = gl.exp2(scores * scale - shift[:, None])
    keep = gl.exp2(best - shift)
    total = total * keep + gl.sum(weights, axis=1)
    return weights, new_best, total, keep


@gluon.jit
def _clear_behind(values, first, length, BOX: gl.constexpr):
    """Zero the values behind the sequence's end: whatever lies there, times a weight of 0, must be 0."""
    KEYS: gl.constexpr = values.shape[0]
    PARTS: gl.constexpr = values.shape[1] // 64
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    row = gl.arange(0, BOX, gl.SliceLayout(1, layout))
    boxes = values._reinterpret(values.dtype, [PARTS * (KEYS // BOX), BOX, 64], values.layout)
    for box in range((length - first) // BOX, KEYS // BOX):
        for part in gl.static_range(PARTS):
            tokens = boxes.index(part * (KEYS // BOX) + box)
            inside = first + box * BOX + row < length
            tokens.store(gl.where(inside[:, None], tokens.load(layout), 0.0).to(values.dtype))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _compute(
    lists,
    buffers,
    barriers,
    scalars,
    out_ptr,
    NUM_HEADS: gl.constexpr,
    HEADS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    BOX: gl.constexpr,
    WINDOWED: gl.constexpr,
    CAPPED: gl.constexpr,
    HALF: gl.constexpr,
):
    """Four warps with the rows [64 * HALF, 64 * HALF + 64) of each tile; row m is token m // HEADS, head m % HEADS."""
    tiles_ptr, count_ptr = lists
    scale, soft_cap, window = scalars
    query_smem, key_smem, value_smem = buffers
    query_full, query_free, key_full, key_free, value_full, value_free = barriers
    QUERIES: gl.constexpr = query_smem.shape[0] // 2
    STAGES: gl.constexpr = key_smem.shape[0]
    KEYS: gl.constexpr = key_smem.shape[1]
    DIM: gl.constexpr = key_smem.shape[2]
    HEAD_TILES: gl.constexpr = NUM_HEADS // HEADS
    dtype: gl.constexpr = query_smem.dtype
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, DIM, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, out_layout, 2)
    no_scores = gl.zeros([64, KEYS], gl.float32, score_layout)
    total_tiles = gl.load(count_ptr) * HEAD_TILES
    served, done = 0, 0
    for turn in range(gl.cdiv(total_tiles, gl.num_programs(0))):
        index = _tile_index(turn)
        if index < total_tiles:
            tile = tiles_ptr + index // HEAD_TILES * 8
            start, end, length = gl.load(tile + 4), gl.load(tile + 5), gl.load(tile + 7)
            lowest = gl.load(tile + 1) + HALF * 64 // HEADS
            position = lowest + gl.arange(0, 64, gl.SliceLayout(1, score_layout)) // HEADS
            best = gl.full([64], -float("inf"), gl.float32, gl.SliceLayout(1, score_layout))
            total = gl.zeros([64], gl.float32, gl.SliceLayout(1, score_layout))
            acc = gl.zeros([64, DIM], gl.float32, out_layout)
            last = gl.cdiv(end, KEYS) - 1
            steps = last + 1 - start // KEYS
            stage, phase = done % STAGES, done // STAGES & 1
            slot = served % QUERIES
            query = query_smem.index(slot * 2 + HALF)
            mbarrier.wait(query_full.index(slot), served // QUERIES & 1)
            mbarrier.wait(key_full.index(stage), phase)
            scores = warpgroup_mma(
                query, key_smem.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
            )
            scores = warpgroup_mma_wait(0, [scores])
            gl.thread_barrier()
            mbarrier.arrive(key_free.index(stage))
            weights, best, total, _ = _softmax(
                scores, best, total, last * KEYS, position, scale, soft_cap, window, lowest, HEADS, WINDOWED, CAPPED
            )
            weights = gl.convert_layout(weights.to(dtype), weight_layout)
            if last * KEYS + KEYS > length:
                mbarrier.wait(value_full.index(stage), phase)
                _clear_behind(value_smem.index(stage), last * KEYS, length, BOX)
            for step in range(1, steps):
                values, values_full, values_free = (
                    value_smem.index(stage),
                    value_full.index(stage),
                    value_free.index(stage),
                )
                values_phase = phase
                done += 1
                stage, phase = done % STAGES, done // STAGES & 1
                mbarrier.wait(key_full.index(stage), phase)
                scores = warpgroup_mma(
                    query, key_smem.index(stage).permute((1, 0)), no_scores, use_acc=False, is_async=True
                )
                mbarrier.wait(values_full, values_phase)
                acc = warpgroup_mma(weights, values, acc, is_async=True)
                scores = warpgroup_mma_wait(1, [scores])
                gl.thread_barrier()
                mbarrier.arrive(key_free.index(stage))
                first = (last - step) * KEYS
                next_weights, best, total, keep = _softmax(
                    scores, best, total, first, position, scale, soft_cap, window, lowest, HEADS, WINDOWED, CAPPED
                )
                next_weights = gl.convert_layout(next_weights.to(dtype), weight_layout)
                acc, weights, next_weights = warpgroup_mma_wait(0, [acc, weights, next_weights])
                gl.thread_barrier()
                mbarrier.arrive(values_free)
                acc = acc * gl.convert_layout(keep, gl.SliceLayout(1, out_layout))[:, None]
                weights = next_weights
            mbarrier.arrive(query_free.index(slot))
            mbarrier.wait(value_full.index(stage), phase)
            acc = warpgroup_mma(weights, value_smem.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, [acc])
            gl.thread_barrier()
            mbarrier.arrive(value_free.index(stage))
            done += 1
            served += 1
            acc = acc * gl.convert_layout(1 / total, gl.SliceLayout(1, out_layout))[:, None]
            member = HALF * 64 + gl.arange(0, 64, gl.SliceLayout(1, out_layout))
            column = gl.arange(0, DIM, gl.SliceLayout(0, out_layout))
            row = (gl.load(tile) + member // HEADS).to(gl.int64)
            head = index % HEAD_TILES * HEADS + member % HEADS
            mask = (member // HEADS < gl.load(tile + 2))[:, None] & (column < HEAD_DIM)[None, :]
            target = ((row * NUM_HEADS + head) * HEAD_DIM)[:, None] + column[None, :]
            gl.store(out_ptr + target, acc.to(dtype), mask=mask)


@gluon.jit(do_not_specialize=["layer", "window", "table_stride"])
def _prefill(
    query_desc,
    pool_desc,
    tables_ptr,
    tiles_ptr,
    count_ptr,
    out_ptr,
    scale,
    soft_cap,
    layer,
    window,
    table_stride,
    NUM_HEADS: gl.constexpr,
    KV_HEADS: gl.constexpr,
    LAYERS: gl.constexpr,
    BLOCK_SIZE: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    DIM: gl.constexpr,
    KEYS: gl.constexpr,
    STAGES: gl.constexpr,
    QUERIES: gl.constexpr,
    WINDOWED: gl.constexpr,
    CAPPED: gl.constexpr,
):
    """KEYS keys a step, STAGES of them in shared memory; DIM is HEAD_DIM padded to a power of two."""
    HEADS: gl.constexpr = query_desc.block_type.shape[1]
    BOX: gl.constexpr = pool_desc.block_type.shape[0]
    dtype: gl.constexpr = pool_desc.dtype
    layout: gl.constexpr = pool_desc.layout
    buffers = (
        gl.allocate_shared_memory(dtype, [2 * QUERIES, 64, DIM], layout),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], layout),
        gl.allocate_shared_memory(dtype, [STAGES, KEYS, DIM], layout),
    )
    query_full = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    query_free = gl.allocate_shared_memory(gl.int64, [QUERIES, 1], mbarrier.MBarrierLayout())
    key_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    key_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    value_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(QUERIES):
        mbarrier.init(query_full.index(slot), count=1)
        mbarrier.init(query_free.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(key_full.index(stage), count=1)
        mbarrier.init(key_free.index(stage), count=2)
        mbarrier.init(value_full.index(stage), count=1)
        mbarrier.init(value_free.index(stage), count=2)
    barriers = (query_full, query_free, key_full, key_free, value_full, value_free)
    lists = (tiles_ptr, count_ptr)
    scalars = (scale, soft_cap, window)
    place = (tables_ptr, table_stride, layer)
    gl.warp_specialize(
        [
            (
                _compute,
                (lists, buffers, barriers, scalars, out_ptr, NUM_HEADS, HEADS, HEAD_DIM, BOX, WINDOWED, CAPPED, 0),
            ),
            (
                _compute,
                (lists, buffers, barriers, scalars, out_ptr, NUM_HEADS, HEADS, HEAD_DIM, BOX, WINDOWED, CAPPED, 1),
            ),
            (
                _fetch,
                (
                    lists,
                    buffers,
                    barriers,
                    query_desc,
                    pool_desc,
                    place,
                    NUM_HEADS,
                    KV_HEADS,
                    LAYERS,
                    BLOCK_SIZE,
                    WINDOWED,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


def prefill(problem: Problem, tiles: torch.Tensor, num_tiles: torch.Tensor) -> None:
    """Tiles [n, TILE_FIELDS] of attention.tile_tokens query rows; num_tiles int32 [1] of them count, on the device."""
    query, pool = problem.query, problem.pool
    num_blocks, kv_heads, layers, _, block_size, dim = pool.shape
    heads = query.shape[1]
    group = head_tile(heads, kv_heads)
    padded = max(_COLUMNS, 1 << (dim - 1).bit_length())
    keys = 128 if padded <= 128 else 64
    box = min(block_size & -block_size, keys)
    programs = torch.cuda.get_device_properties(query.device).multi_processor_count
    query_box, query_layout = [ROWS // 2 // group, group, _COLUMNS], gl.NVMMASharedLayout(128, 16, 3)
    pool_rows, pool_layout = num_blocks * kv_heads * layers * 2 * block_size, gl.NVMMASharedLayout(128, 16, 2)
    _prefill[(programs,)](
        TensorDescriptor(query, list(query.shape), list(query.stride()), query_box, query_layout),
        TensorDescriptor(pool, [pool_rows, dim], [dim, 1], [box, _COLUMNS], pool_layout),
        problem.tables,
        tiles,
        num_tiles,
        problem.out,
        problem.scale * LOG2E,
        problem.soft_cap / problem.scale,
        problem.layer,
        problem.window,
        problem.tables.stride(0),
        heads,
        kv_heads,
        layers,
        block_size,
        dim,
        padded,
        keys,
        2,
        2 if padded <= 128 else 1,
        problem.window > 0,
        problem.soft_cap > 0,
        num_warps=4,
        maxnreg=168,
    )
