"""Matrix products for few rows, which take as long as reading the weights: what stands around them is folded in.

One row runs on the plain arithmetic units, several on the tensor cores with the weights as the larger operand. Programs
start while the kernel before still runs (pdl.py) and have their first weights loaded by the time it ends.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.cuda import pdl, tuning
from baton.kernels.ops import Norm

_WARP_WEIGHTS = 2048
"""Of each matrix, that one warp of _one_row holds at a time: 64 for a thread."""
_SUM_BLOCK = 1024


@triton.jit
def _input(x_ptr, norm_ptr, column, scale, FEATURES: tl.constexpr, NORMED: tl.constexpr, EVEN: tl.constexpr):
    """x, or weight * (x * scale), rounded as rms_norm does; float32."""
    mask = None if EVEN else column < FEATURES
    x = tl.load(x_ptr + column, mask=mask)
    if NORMED:
        x = tl.load(norm_ptr + column, mask=mask) * (x.to(tl.float32) * scale).to(x.dtype)
    return x.to(tl.float32) if EVEN else tl.where(mask, x.to(tl.float32), 0.0)


@triton.jit
def _weights(w_ptr, row, column, ROWS: tl.constexpr, FEATURES: tl.constexpr, EVEN: tl.constexpr):
    """w [row, column]; zeros beyond the matrix."""
    where = w_ptr + row * FEATURES + column
    if EVEN:
        return tl.load(where, eviction_policy="evict_first")
    return tl.load(where, mask=(row < ROWS) & (column < FEATURES), other=0.0, eviction_policy="evict_first")


@triton.jit
def _finish(
    acc,
    acc_up,
    bias_ptr,
    residual_ptr,
    out_ptr,
    row,
    where,
    mask,
    ROWS: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
):
    """Bias, SwiGLU and residual, rounded as the separate kernels do; stored at `where`. row: of the weight."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    if BIAS:
        acc += tl.load(bias_ptr + row, mask=row < ROWS, other=0.0).to(tl.float32)
    y = acc.to(dtype)
    if GATED:
        if BIAS:
            acc_up += tl.load(bias_ptr + ROWS + row, mask=row < ROWS, other=0.0).to(tl.float32)
        gate = y.to(tl.float32)
        y = (gate / (1 + tl.exp(-gate))).to(dtype) * acc_up.to(dtype)
    if RESIDUAL:
        y += tl.load(residual_ptr + where, mask=mask, other=0.0)
    tl.store(out_ptr + where, y, mask=mask)


@triton.jit
def _products(w, x, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """w [BLOCK_N, BLOCK_K] * x [1, BLOCK_K], with eight neighbours, which one thread holds, summed."""
    return tl.sum(tl.reshape(w.to(tl.float32) * x, [BLOCK_N, BLOCK_K // 8, 8]), axis=2)


@triton.jit
def _one_row(
    x_ptr,
    norm_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    eps,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    SIZE: tl.constexpr,
    NORMED: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per BLOCK_N of ROWS results. SIZE is the power of two from FEATURES on."""
    EVEN_K: tl.constexpr = FEATURES % BLOCK_K == 0
    EVEN: tl.constexpr = EVEN_K and ROWS % BLOCK_N == 0
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    wide_row = row.to(tl.int64)[:, None]
    column = tl.arange(0, BLOCK_K)[None, :]
    up_ptr = w_ptr + tl.full([], ROWS, tl.int64) * FEATURES
    w = _weights(w_ptr, wide_row, column, ROWS, FEATURES, EVEN)
    if GATED:
        up = _weights(up_ptr, wide_row, column, ROWS, FEATURES, EVEN)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    scale = 1.0
    if NORMED:
        every = tl.arange(0, SIZE)
        whole = tl.load(x_ptr + every, mask=every < FEATURES, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(whole * whole, axis=0) / FEATURES + eps)
    x = _input(x_ptr, norm_ptr, column, scale, FEATURES, NORMED, EVEN_K)
    acc = _products(w, x, BLOCK_N, BLOCK_K)
    acc_up = acc
    if GATED:
        acc_up = _products(up, x, BLOCK_N, BLOCK_K)
    for first in range(BLOCK_K, FEATURES, BLOCK_K):
        w = _weights(w_ptr, wide_row, first + column, ROWS, FEATURES, EVEN)
        if GATED:
            up = _weights(up_ptr, wide_row, first + column, ROWS, FEATURES, EVEN)
        x = _input(x_ptr, norm_ptr, first + column, scale, FEATURES, NORMED, EVEN_K)
        acc += _products(w, x, BLOCK_N, BLOCK_K)
        if GATED:
            acc_up += _products(up, x, BLOCK_N, BLOCK_K)
    y, y_up = tl.sum(acc, axis=1), tl.sum(acc_up, axis=1)
    _finish(y, y_up, bias_ptr, residual_ptr, out_ptr, row, row, row < ROWS, ROWS, GATED, BIAS, RESIDUAL)


@triton.jit(do_not_specialize=["count"])
def _few_rows(
    x_ptr,
    w_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    parts_ptr,
    count,
    ROWS: tl.constexpr,
    FEATURES: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per BLOCK_N of ROWS results of all `count` rows, and per SPAN of the features."""
    EVEN_K: tl.constexpr = FEATURES % BLOCK_K == 0
    EVEN: tl.constexpr = EVEN_K and ROWS % BLOCK_N == 0
    row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    wide_row = row.to(tl.int64)
    member = tl.arange(0, BLOCK_M)[None, :]
    column = tl.arange(0, BLOCK_K)
    up_ptr = w_ptr + tl.full([], ROWS, tl.int64) * FEATURES
    start = tl.program_id(1) * SPAN
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = acc
    for first in range(start, tl.minimum(start + SPAN, FEATURES), BLOCK_K):
        columns = first + column
        x_ok = (member < count) if EVEN_K else (member < count) & (columns < FEATURES)[:, None]
        x = tl.load(x_ptr + member * FEATURES + columns[:, None], mask=x_ok, other=0.0)
        acc = tl.dot(_weights(w_ptr, wide_row, columns[None, :], ROWS, FEATURES, EVEN), x, acc)
        if GATED:
            acc_up = tl.dot(_weights(up_ptr, wide_row, columns[None, :], ROWS, FEATURES, EVEN), x, acc_up)
    where = member * ROWS + row
    mask = (member < count) & (row < ROWS)
    if SPAN < FEATURES:
        tl.store(parts_ptr + tl.program_id(1) * count * ROWS + where, acc, mask=mask)
    else:
        _finish(acc, acc_up, bias_ptr, residual_ptr, out_ptr, row, where, mask, ROWS, GATED, BIAS, RESIDUAL)


@triton.jit(do_not_specialize=["count"])
def _sum_parts(
    parts_ptr,
    bias_ptr,
    residual_ptr,
    out_ptr,
    count,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """The parts of _few_rows, in their order."""
    where = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = where < count * ROWS
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK], tl.float32)
    for split in tl.static_range(SPLITS):
        acc += tl.load(parts_ptr + split * count * ROWS + where, mask=mask, other=0.0)
    _finish(acc, acc, bias_ptr, residual_ptr, out_ptr, where % ROWS, where, mask, ROWS, False, BIAS, RESIDUAL)


def one_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    norm: Norm | None,
    residual: torch.Tensor | None,
    gated: bool,
    tile: tuning.RowTile,
) -> torch.Tensor:
    """x [1, features], dense; otherwise Ops.linear, or Ops.gated_linear. The residual is overwritten."""
    rows, features = len(weight) // (2 if gated else 1), weight.shape[1]
    out = torch.empty(1, rows, dtype=x.dtype, device=x.device) if residual is None else residual
    size = triton.next_power_of_2(features)
    _one_row[(triton.cdiv(rows, tile.rows),)](
        x,
        None if norm is None else norm.weight,
        weight,
        bias,
        residual,
        out,
        0.0 if norm is None else norm.eps,
        rows,
        features,
        size,
        norm is not None,
        gated,
        bias is not None,
        residual is not None,
        tile.rows,
        min(size, tile.features),
        num_warps=max(1, tile.rows * min(size, tile.features) // _WARP_WEIGHTS),
        **pdl.options(),
    )
    return out


def few_rows(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    gated: bool,
    tile: tuning.FewTile,
) -> torch.Tensor:
    """x [n, features] of 16 bits, dense, n at most tile.count; otherwise as one_row, without a norm."""
    rows, features = len(weight) // (2 if gated else 1), weight.shape[1]
    count = len(x)
    out = torch.empty(count, rows, dtype=x.dtype, device=x.device) if residual is None else residual
    tiles = triton.cdiv(rows, tile.rows)
    blocks = triton.cdiv(features, tile.features)
    span = triton.cdiv(blocks, 1 if gated else tile.splits(tiles))
    splits = triton.cdiv(blocks, span)
    parts = torch.empty(splits, count, rows, dtype=torch.float32, device=x.device) if splits > 1 else out
    _few_rows[(tiles, splits)](
        x,
        weight,
        bias,
        residual,
        out,
        parts,
        count,
        rows,
        features,
        gated,
        bias is not None,
        residual is not None,
        span * tile.features,
        tile.count,
        tile.rows,
        tile.features,
        num_warps=tile.warps,
        num_stages=tile.stages,
        **pdl.options(),
    )
    if splits > 1:
        _sum_parts[(triton.cdiv(count * rows, _SUM_BLOCK),)](
            parts,
            bias,
            residual,
            out,
            count,
            rows,
            bias is not None,
            residual is not None,
            splits,
            _SUM_BLOCK,
            num_warps=4,
            **pdl.options(),
        )
    return out
