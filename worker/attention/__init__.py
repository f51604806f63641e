"""Which implementation of the fused operations, paged attention first, serves a device and dtype."""

import logging

import torch

from baton.kernels.ops import Ops

log = logging.getLogger(__name__)


def choose_cpu_ops(dtype: torch.dtype) -> Ops:
    """Plain torch."""
    from baton.kernels.reference import TorchOps

    return TorchOps()
