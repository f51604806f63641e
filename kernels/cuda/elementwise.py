"""Norms, activation and rotary embedding: memory-bound, so each reads and writes every element once."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.cuda import pdl
from baton.kernels.ops import Norm


@triton.jit
def _rms_norm(x_ptr, weight_ptr, out_ptr, eps, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """One program per row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < size
    weight = tl.load(weight_ptr + columns, mask=mask, other=0.0)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    x = tl.load(x_ptr + row * size + columns, mask=mask, other=0.0)
    x32 = x.to(tl.float32)
    normed = x32 * tl.rsqrt(tl.sum(x32 * x32, axis=0) / size + eps)
    tl.store(out_ptr + row * size + columns, weight * normed.to(x.dtype), mask=mask)


def rms_norm(x: torch.Tensor, norm: Norm) -> torch.Tensor:
    """x [n, hidden], dense; see Ops."""
    n, size = x.shape
    out = torch.empty_like(x)
    block = triton.next_power_of_2(size)
    warps = min(16, max(1, block // 512))
    _rms_norm[(n,)](x, norm.weight, out, norm.eps, size, block, num_warps=warps, **pdl.options())
    return out


@triton.jit
def _silu_and_mul(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    gate = tl.load(gate_up_ptr + row * 2 * size + columns, mask=mask, other=0.0)
    up = tl.load(gate_up_ptr + row * 2 * size + size + columns, mask=mask, other=0.0)
    gate32 = gate.to(tl.float32)
    tl.store(out_ptr + row * size + columns, (gate32 / (1 + tl.exp(-gate32))).to(gate.dtype) * up, mask=mask)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """See Ops."""
    n, size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(n, size, dtype=gate_up.dtype, device=gate_up.device)
    block = min(2048, triton.next_power_of_2(size))
    warps = min(8, max(1, block // 256))
    _silu_and_mul[(n, triton.cdiv(size, block))](gate_up, out, size, block, num_warps=warps, **pdl.options())
    return out


@triton.jit(do_not_specialize=["layer"])
def _rope_and_cache(
    qkv_ptr,
    cos_sin_ptr,
    positions_ptr,
    slots_ptr,
    pool_ptr,
    query_norm_ptr,
    key_norm_ptr,
    eps,
    layer,
    block_stride,
    head_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    NORMED: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK_REST: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per token and HEADS heads. A head is its two rotating halves and the rest, which stays."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    total: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS
    column = tl.arange(0, BLOCK_HALF)[None, :]
    rest = 2 * HALF + tl.arange(0, BLOCK_REST)[None, :]
    in_half = (head < total) & (column < HALF)
    in_rest = (head < total) & (rest < HEAD_DIM)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    base = qkv_ptr + token * total * HEAD_DIM + head * HEAD_DIM
    first = tl.load(base + column, mask=in_half, other=0.0)
    second = tl.load(base + HALF + column, mask=in_half, other=0.0)
    others = tl.load(base + rest, mask=in_rest, other=0.0)
    is_query = head < NUM_HEADS
    is_value = head >= NUM_HEADS + NUM_KV_HEADS
    if NORMED:
        first32, second32, others32 = first.to(tl.float32), second.to(tl.float32), others.to(tl.float32)
        squares = tl.sum(first32 * first32 + second32 * second32, axis=1) + tl.sum(others32 * others32, axis=1)
        scale = tl.rsqrt(squares / HEAD_DIM + eps)[:, None]
        weight = tl.where(is_query, query_norm_ptr, key_norm_ptr)
        normed = in_half & (head < NUM_HEADS + NUM_KV_HEADS)
        w1 = tl.load(weight + column, mask=normed, other=1.0)
        w2 = tl.load(weight + HALF + column, mask=normed, other=1.0)
        w3 = tl.load(weight + rest, mask=in_rest & (head < NUM_HEADS + NUM_KV_HEADS), other=1.0)
        first = tl.where(is_value, first, w1 * (first32 * scale).to(first.dtype))
        second = tl.where(is_value, second, w2 * (second32 * scale).to(first.dtype))
        others = tl.where(is_value, others, w3 * (others32 * scale).to(first.dtype))
    position = tl.load(positions_ptr + token).to(tl.int64)
    cos = tl.load(cos_sin_ptr + position * 2 * HALF + column, mask=column < HALF, other=0.0)
    sin = tl.load(cos_sin_ptr + position * 2 * HALF + HALF + column, mask=column < HALF, other=0.0)
    first32, second32 = first.to(tl.float32), second.to(tl.float32)
    turned_first = tl.where(is_value, first, (first32 * cos - second32 * sin).to(first.dtype))
    turned_second = tl.where(is_value, second, (second32 * cos + first32 * sin).to(first.dtype))
    tl.store(base + column, turned_first, mask=in_half & is_query)
    tl.store(base + HALF + column, turned_second, mask=in_half & is_query)
    tl.store(base + rest, others, mask=in_rest & is_query)
    slot = tl.load(slots_ptr + token)
    kv_head = head - NUM_HEADS - tl.where(is_value, NUM_KV_HEADS, 0)
    row = (layer * 2 + is_value.to(tl.int32)) * BLOCK_SIZE + slot % BLOCK_SIZE
    cached = pool_ptr + (slot // BLOCK_SIZE) * block_stride + kv_head * head_stride + row * HEAD_DIM
    written = (slot >= 0) & (head >= NUM_HEADS)
    tl.store(cached + column, turned_first, mask=in_half & written)
    tl.store(cached + HALF + column, turned_second, mask=in_half & written)
    tl.store(cached + rest, others, mask=in_rest & written)


def rope_and_cache(
    qkv: torch.Tensor,
    num_heads: int,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    slot_mapping: torch.Tensor,
    pool: torch.Tensor,
    layer: int,
    qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> torch.Tensor:
    """See Ops. The queries are a view of qkv; a token whose slot is negative is written nowhere."""
    _, kv_heads, _, _, block_size, dim = pool.shape
    half = cos_sin.shape[1] // 2
    query_norm, key_norm, eps = (qkv, qkv, 0.0) if qk_norm is None else qk_norm
    total, heads = num_heads + 2 * kv_heads, 8
    _rope_and_cache[(len(qkv), triton.cdiv(total, heads))](
        qkv,
        cos_sin,
        positions,
        slot_mapping,
        pool,
        query_norm,
        key_norm,
        eps,
        layer,
        pool.stride(0),
        pool.stride(1),
        num_heads,
        kv_heads,
        dim,
        half,
        block_size,
        qk_norm is not None,
        heads,
        triton.next_power_of_2(half),
        triton.next_power_of_2(max(1, dim - 2 * half)),
        num_warps=4,
        **pdl.options(),
    )
    return qkv.view(len(qkv), total, dim)[:, :num_heads]
