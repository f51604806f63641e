"""Layers that own a matrix: loaded row by row from a checkpoint, then packed for the device's products."""

from collections.abc import Sequence

import torch
from torch import nn

from baton.kernels.ops import Norm, Ops, PackedWeight


def parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    """Without memory, which weights/placement.py gives it."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


class Matrix(nn.Module):
    """A weight [rows, features]. It is a parameter while it is filled, and packed from then on."""

    packed: PackedWeight

    def __init__(self, rows: int, features: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops = ops
        self.weight: nn.Parameter | None = nn.Parameter(
            torch.empty(rows, features, dtype=dtype, device="meta"), requires_grad=False
        )

    def pack(self) -> None:
        """Replace the parameter by its packed form."""
        if self.weight is not None:
            self.packed = self.ops.pack(self.weight.data)
            self.weight = None


class Linear(Matrix):
    """y = x W^T + b. `shards` are the output rows of each checkpoint tensor merged into this one, in order."""

    def __init__(self, features: int, shards: Sequence[int], bias: bool, ops: Ops, dtype: torch.dtype) -> None:
        self.shards = tuple(shards)
        rows = sum(self.shards)
        super().__init__(rows, features, ops, dtype)
        self.bias = parameter(rows, dtype=dtype) if bias else None

    def forward(self, x: torch.Tensor, norm: Norm | None = None, residual: torch.Tensor | None = None) -> torch.Tensor:
        """norm(x [num_tokens, features]) W^T + b + residual -> [num_tokens, rows]; `residual` may be overwritten."""
        return self.ops.linear(x, self.packed, self.bias, norm, residual)

    def gated(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """silu(gate) * up of norm(x [num_tokens, features]), whose first half of rows is gate -> [.., rows / 2]."""
        return self.ops.gated_linear(x, self.packed, self.bias, norm)


class Embedding(Matrix):
    """Token id -> vector, and vector -> logits where the checkpoint ties the two."""

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        """int64 [n] -> [n, features]."""
        return self.ops.embedding(token_ids, self.packed)

    def logits(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """norm(x [n, features]) -> [n, rows]."""
        return self.ops.linear(x, self.packed, None, norm)
