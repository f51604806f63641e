"""Linear layers whose weights may come from several checkpoint tensors."""

from collections.abc import Sequence

import torch
from torch import nn


class Linear(nn.Module):
    """y = x W^T + b for x [num_tokens, in_features].

    `shards` are the output rows of each checkpoint tensor that is merged into this one, in order.
    """

    def __init__(self, in_features: int, shards: Sequence[int], bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.shards = tuple(shards)
        rows = sum(self.shards)
        self.weight = nn.Parameter(torch.empty(rows, in_features, dtype=dtype), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows, dtype=dtype), requires_grad=False) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[num_tokens, in_features] -> [num_tokens, out_features]."""
        return nn.functional.linear(x, self.weight, self.bias)
