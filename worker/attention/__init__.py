"""Which implementation of the fused operations, paged attention first, serves a device, dtype and head size."""

import logging

import torch

from baton.kernels.ops import Ops

log = logging.getLogger(__name__)


def choose_ops(device: str, dtype: torch.dtype, head_dim: int, batch_invariant: bool = False) -> Ops:
    """The fastest that can; says so when that is not the intended one. Raises ValueError when nothing can."""
    if device not in _FACTORIES:
        raise ValueError(f"device '{device}' is not supported; supported: {', '.join(_FACTORIES)}")
    return _FACTORIES[device](dtype, head_dim, batch_invariant)


def _cpu(dtype: torch.dtype, head_dim: int, batch_invariant: bool) -> Ops:
    from baton.kernels.cpu.build import BuildError, build
    from baton.kernels.cpu.ops import MAX_HEAD_DIM, CpuOps
    from baton.kernels.reference import TorchOps

    reason = ""
    if dtype != torch.float32:
        reason = f"they compute in float32, not {str(dtype).removeprefix('torch.')}"
    elif head_dim % 16 != 0 or head_dim > MAX_HEAD_DIM:
        reason = f"head size {head_dim} is no multiple of 16 up to {MAX_HEAD_DIM}"
    else:
        try:
            return CpuOps(build(), torch.get_num_threads())
        except (BuildError, OSError) as error:
            reason = str(error)
    if batch_invariant:
        raise ValueError(f"--batch-invariant needs the C kernels, which can't be used: {reason}")
    log.warning("C kernels are not used, plain torch operations are (several times slower): %s", reason)
    return TorchOps()


def _cuda(dtype: torch.dtype, head_dim: int, batch_invariant: bool) -> Ops:
    from baton.kernels.cuda.invariant import InvariantOps
    from baton.kernels.cuda.ops import CudaOps

    if not 16 <= head_dim <= 256:
        raise ValueError(f"head size {head_dim} is not served on a GPU, only 16 to 256")
    return InvariantOps() if batch_invariant else CudaOps()


_FACTORIES = {"cpu": _cpu, "cuda": _cuda}
