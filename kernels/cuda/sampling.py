"""Argmax and the counter-based draw, without sorting the vocabulary."""

import torch
import triton
import triton.language as tl

_SPLITS = 16
"""Programs per row of the argmax: one alone would read a row of 128k logits at the speed of one multiprocessor."""


@triton.jit
def _argmax_parts(
    logits_ptr, values_ptr, indices_ptr, row_stride, size, span, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    row, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
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
def _argmax_final(values_ptr, indices_ptr, tokens_ptr, SPLITS: tl.constexpr):
    row = tl.program_id(0)
    values = tl.load(values_ptr + row * SPLITS + tl.arange(0, SPLITS))
    indices = tl.load(indices_ptr + row * SPLITS + tl.arange(0, SPLITS))
    best = tl.max(values, axis=0)
    tl.store(tokens_ptr + row, tl.min(tl.where(values == best, indices, 2147483647), axis=0).to(tl.int64))


def argmax(logits: torch.Tensor) -> torch.Tensor:
    """logits [n, vocab] of any float dtype -> int64 [n], the first of equals."""
    n, size = logits.shape
    values = torch.empty(n, _SPLITS, dtype=torch.float32, device=logits.device)
    indices = torch.empty(n, _SPLITS, dtype=torch.int32, device=logits.device)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    span = triton.cdiv(size, _SPLITS)
    _argmax_parts[(n, _SPLITS)](logits, values, indices, logits.stride(0), size, span, _SPLITS, 1024, num_warps=4)
    _argmax_final[(n,)](values, indices, tokens, _SPLITS, num_warps=1)
    return tokens


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
    BLOCK: tl.constexpr,
):
    """One program per row. `tokens` holds the row's argmax and keeps it where the temperature is 0."""
    row = tl.program_id(0).to(tl.int64)
    temperature = tl.load(temperatures_ptr + row * temperature_stride)
    if temperature <= 0.0:
        return
    logits_row = logits_ptr + row * row_stride
    best = tl.load(logits_row + tl.load(tokens_ptr + row)).to(tl.float32)
    top_k, min_p = tl.load(top_k_ptr + row * top_k_stride), tl.load(min_p_ptr + row * min_p_stride)
    top_p = tl.load(top_p_ptr + row * top_p_stride)
    threshold = tl.where(min_p > 0, tl.log(min_p), -3.0e38)
    if (top_k > 0) & (top_k < size):
        threshold = _lowest_kept(logits_row, size, best, temperature, threshold, top_k.to(tl.float64), True, BLOCK)
    total = _mass(logits_ptr + row * row_stride, size, best, temperature, threshold, False, BLOCK)
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
    tl.store(tokens_ptr + row, token.to(tl.int64), mask=token < size)


def draw(
    logits: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniforms: torch.Tensor,
    tokens: torch.Tensor,
) -> None:
    """See Ops.draw; the parameters [n] may be strided. `tokens` int64 [n] holds each row's argmax and takes the draws;
    rows with temperature 0 keep theirs."""
    n, size = logits.shape
    columns = (temperatures, top_k, top_p, min_p, uniforms)
    strides = [column.stride(0) for column in columns]
    _draw[(n,)](logits, *columns, tokens, logits.stride(0), *strides, size, 4096, num_warps=16)
