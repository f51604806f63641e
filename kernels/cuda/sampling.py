"""Argmax and the counter-based draw, without sorting the vocabulary."""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from baton.kernels.cuda import pdl

_PROGRAMS = 512
"""Of the argmax, unless each row has 16: one per row would read 128k logits at the speed of one multiprocessor."""


@triton.jit
def _argmax_parts(
    logits_ptr,
    values_ptr,
    indices_ptr,
    row_stride,
    size,
    span,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    where = tl.zeros([BLOCK], tl.int32)
    end = tl.minimum(size, (split + 1) * span)
    for first in range(split * span, end, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(logits_ptr + row * row_stride + columns, mask=columns < end, other=-float("inf"))
        larger = values.to(tl.float32) > best
        best = tl.where(larger, values.to(tl.float32), best)
        where = tl.where(larger, columns, where)
    value = tl.max(best, axis=0)
    # The first of equals, as in torch on CPU.
    index = tl.min(tl.where(best == value, where, 2147483647), axis=0)
    tl.store(values_ptr + row * SPLITS + split, value)
    tl.store(indices_ptr + row * SPLITS + split, index)


@triton.jit
def _logsumexp(logits_ptr, out_ptr, row_stride, size, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    best = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        values = tl.load(logits_ptr + row * row_stride + columns, mask=columns < size, other=-float("inf"))
        new_best = tl.maximum(best, values.to(tl.float32))
        # A lane that has seen no logit yet would give inf - inf.
        shift = tl.where(new_best == -float("inf"), 0.0, new_best)
        total = total * tl.exp(best - shift) + tl.exp(values.to(tl.float32) - shift)
        best = new_best
    highest = tl.max(best, axis=0)
    tl.store(out_ptr + row, highest + tl.log(tl.sum(total * tl.exp(best - highest), axis=0)))


def logsumexp(logits: torch.Tensor) -> torch.Tensor:
    """logits [n, vocab] of any float dtype -> float32 [n]. torch's order of summation depends on n, this one not."""
    n, size = logits.shape
    out = torch.empty(n, dtype=torch.float32, device=logits.device)
    _logsumexp[(n,)](logits, out, logits.stride(0), size, 4096, num_warps=16)
    return out


@triton.jit
def _scaled(logits_ptr, columns, size, best, temperature):
    """(logits - best) / temperature, at most 0; minus infinity beyond the vocabulary."""
    values = tl.load(logits_ptr + columns, mask=columns < size, other=-float("inf")).to(tl.float32)
    return tl.div_rn(values - best, temperature)


@triton.jit
def _mass(logits_ptr, size, best, temperature, threshold, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """How many scaled logits are at or above the threshold, or their weight."""
    sums = tl.zeros([BLOCK], tl.float64)
    for first in range(0, size, BLOCK):
        scaled = _scaled(logits_ptr, first + tl.arange(0, BLOCK), size, best, temperature)
        weights = tl.exp(scaled).to(tl.float64)
        if COUNT:
            weights = tl.full([BLOCK], 1.0, tl.float64)
        sums += tl.where(scaled >= threshold, weights, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _lowest_kept(logits_ptr, size, best, temperature, floor, wanted, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest value, not below floor, such that the scaled logits at or above it count or weigh `wanted`.

    The bits of the negated value order as it does, so 31 halvings find it to the last bit.
    """
    low = tl.zeros([], tl.int32)  # the answer's bits are in [low, high]
    high = (-floor).to(tl.int32, bitcast=True)
    while low < high:
        middle = low + (high - low) // 2
        threshold = -(middle.to(tl.float32, bitcast=True))
        if _mass(logits_ptr, size, best, temperature, threshold, COUNT, BLOCK) >= wanted:
            high = middle
        else:
            low = middle + 1
    return -(low.to(tl.float32, bitcast=True))


@triton.jit
def _draw(
    logits_ptr,
    values_ptr,
    indices_ptr,
    temperatures_ptr,
    top_k_ptr,
    top_p_ptr,
    min_p_ptr,
    uniforms_ptr,
    tokens_ptr,
    row_stride,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    uniform_stride,
    size,
    SPLITS: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One program per row: the argmax of the row's parts, and a draw unless the temperature is 0."""
    row = tl.program_id(0).to(tl.int64)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    values = tl.load(values_ptr + row * SPLITS + tl.arange(0, SPLITS))
    indices = tl.load(indices_ptr + row * SPLITS + tl.arange(0, SPLITS))
    best = tl.max(values, axis=0)
    greedy = tl.min(tl.where(values == best, indices, 2147483647), axis=0)
    temperature = tl.load(temperatures_ptr + row * temperature_stride)
    if temperature <= 0.0:
        tl.store(tokens_ptr + row, greedy.to(tl.int64))
        return
    logits_row = logits_ptr + row * row_stride
    top_k, min_p = tl.load(top_k_ptr + row * top_k_stride), tl.load(min_p_ptr + row * min_p_stride)
    top_p = tl.load(top_p_ptr + row * top_p_stride)
    threshold = tl.where(min_p > 0, tl.log(min_p), -3.0e38)
    if (top_k > 0) & (top_k < size):
        threshold = _lowest_kept(logits_row, size, best, temperature, threshold, top_k.to(tl.float64), True, BLOCK)
    total = _mass(logits_row, size, best, temperature, threshold, False, BLOCK)
    if top_p < 1.0:
        threshold = _lowest_kept(logits_row, size, best, temperature, threshold, top_p * total, False, BLOCK)
        total = _mass(logits_row, size, best, temperature, threshold, False, BLOCK)
    target = tl.load(uniforms_ptr + row * uniform_stride) * total
    below = tl.zeros([], tl.float64)
    token = size
    first = 0
    while (first < size) & (token == size):
        columns = first + tl.arange(0, BLOCK)
        scaled = _scaled(logits_row, columns, size, best, temperature)
        weights = tl.where(scaled >= threshold, tl.exp(scaled).to(tl.float64), 0.0)
        up_to = below + tl.cumsum(weights, axis=0)
        reached = (up_to > target) & (weights > 0)
        token = tl.minimum(token, tl.min(tl.where(reached, columns, size), axis=0))
        below += tl.sum(weights, axis=0)
        first += BLOCK
    # Rounding of the sum may leave the target unreached; the argmax is then as likely as any last token.
    tl.store(tokens_ptr + row, tl.where(token < size, token, greedy).to(tl.int64))


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """See Ops.draw. logits of any float dtype; rows with temperature 0 get their argmax, the first of equals; the
    parameters [n] may be strided."""
    n, size = logits.shape
    splits = triton.next_power_of_2(max(16, min(128, _PROGRAMS // n)))
    values = torch.empty(n, splits, dtype=torch.float32, device=logits.device)
    indices = torch.empty(n, splits, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    span, options = triton.cdiv(size, splits), pdl.options()
    _argmax_parts[(n, splits)](
        logits, values, indices, logits.stride(0), size, span, splits, 1024, num_warps=4, **options
    )
    columns = (temperatures, top_k, top_p, min_p, uniforms)
    strides = [column.stride(0) for column in columns]
    _draw[(n,)](
        logits,
        values,
        indices,
        *columns,
        tokens,
        logits.stride(0),
        *strides,
        size,
        splits,
        4096,
        num_warps=16,
        **options,
    )
    return tokens
