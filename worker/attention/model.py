"""What the choice of an attention kernel depends on."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Model:
    """A model as attention sees it."""

    dtype: torch.dtype
    head_dim: int
    soft_cap: bool = False
    """Whether scores pass through a tanh."""
    batch_invariant: bool = False
    """As in ModelConfig."""
