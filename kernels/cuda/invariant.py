"""Results of a row that do not depend on what else is in the step: --batch-invariant.

Promised: on one GPU model, the logits after a token have the same bits whatever other rows the step has, whichever
graph or none it runs in, however the prompt before it was cut into chunks or found in the prefix cache, and also when
its stream was preempted and computed again. So streams are the same in every run, seeded ones included.

Products: cuBLAS picks a kernel, and with it an order of summation, by the number of rows. Here every element is one
chain of tensor-core steps in the order of the features, whichever tile computes it: tiles differ in how many rows and
features they hold, never in how they sum. Attention: every row, also a decode row, is a tile of queries that goes over
all its keys in order; nothing is cut to fill the device. All other kernels work row by row anyway.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from baton.kernels.cuda.ops import CudaOps
from baton.kernels.ops import Norm, PackedWeight


@dataclass(frozen=True)
class Tile:
    """Rows, output features and summed features of a tile; warps, and loads in flight."""

    rows: int
    features: int
    depth: int
    warps: int
    stages: int


_ANY = 2**31
_NARROW = 5000
"""Fewer output features than this, in tiles of 64, would leave multiprocessors without work."""
TILES = (
    (16, _ANY, Tile(16, 32, 128, 4, 5)),
    (64, _NARROW, Tile(64, 32, 128, 4, 5)),
    (64, _ANY, Tile(64, 64, 64, 4, 6)),
    (128, _NARROW, Tile(64, 64, 128, 4, 4)),
    (128, 8000, Tile(128, 64, 64, 4, 5)),
    (256, _NARROW, Tile(128, 64, 64, 4, 5)),
    (_ANY, _ANY, Tile(128, 128, 64, 4, 4)),
)
"""Up to so many rows and output features: the tile that was fastest on an H200 (docs/performance.md)."""
FLOAT32 = Tile(32, 64, 32, 4, 2)


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    num_rows,
    num_features,
    size,
    x_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    EVEN_K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ADDS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per tile. Programs that run together share rows and features: GROUP tiles of rows at a time."""
    index = tl.program_id(0).to(tl.int64)
    row_tiles, feature_tiles = tl.cdiv(num_rows, BLOCK_M), tl.cdiv(num_features, BLOCK_N)
    group = index // (GROUP * feature_tiles)
    first = group * GROUP
    members = tl.minimum(row_tiles - first, GROUP)
    within = index % (GROUP * feature_tiles)
    rows = (first + within % members) * BLOCK_M + tl.arange(0, BLOCK_M)
    features = within // members * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    row_ok, feature_ok = (rows < num_rows)[:, None], (features < num_features)[:, None]
    x = x_ptr + rows[:, None] * x_stride + depth[None, :]
    weight = weight_ptr + features[:, None] * size + depth[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, size, BLOCK_K):
        inside = (depth < size - start)[None, :]
        left = tl.load(x, mask=row_ok if EVEN_K else row_ok & inside, other=0.0)
        right = tl.load(weight, mask=feature_ok if EVEN_K else feature_ok & inside, other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision=PRECISION)
        x += BLOCK_K
        weight += BLOCK_K
    if HAS_BIAS:
        acc += tl.load(bias_ptr + features, mask=features < num_features, other=0.0).to(tl.float32)[None, :]
    out = out_ptr + rows[:, None] * num_features + features[None, :]
    written = row_ok & (features < num_features)[None, :]
    if ADDS:
        acc += tl.load(out, mask=written, other=0.0).to(tl.float32)
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=written)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None, tile: Tile
) -> torch.Tensor:
    """x [n, features], weight [rows, features], residual [n, rows], all dense -> [n, rows], written over the residual.

    See Ops.linear.
    """
    n, size = x.shape
    out = torch.empty(n, len(weight), dtype=x.dtype, device=x.device) if residual is None else residual
    programs = triton.cdiv(n, tile.rows) * triton.cdiv(len(weight), tile.features)
    _product[(programs,)](
        x,
        weight,
        x if bias is None else bias,
        out,
        n,
        len(weight),
        size,
        x.stride(0),
        tile.rows,
        tile.features,
        tile.depth,
        8,
        size % tile.depth == 0,
        bias is not None,
        residual is not None,
        "tf32" if x.element_size() == 2 else "ieee",
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    return out


def choose_tile(rows: int, features: int, dtype: torch.dtype) -> Tile:
    """The first of TILES that is meant for so many rows and output features."""
    if dtype == torch.float32:
        return FLOAT32
    return next(tile for most_rows, most_features, tile in TILES if rows <= most_rows and features <= most_features)


class InvariantOps(CudaOps):
    """CudaOps with the promise above."""

    splits_decode = False

    def __init__(self) -> None:
        super().__init__(skinny_products=False)

    def linear(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Ops."""
        x = x if norm is None else self.rms_norm(x, norm)
        return product(x, packed.data, bias, residual, choose_tile(len(x), packed.rows, x.dtype))
