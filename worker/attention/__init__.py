"""Which implementation of the fused operations, paged attention first, serves a device, a model and a wish."""

import logging

import torch

from baton.kernels.ops import Ops
from baton.proto.errors import UserError
from baton.worker.attention.model import Model

log = logging.getLogger(__name__)


def choose_ops(device: str, model: Model, backend: str = "auto") -> Ops:
    """The fastest that can; says so when that is not the intended one.

    Raises ValueError for an unknown device, UserError for a backend that can't serve the model or is not installed.
    """
    if device not in _FACTORIES:
        raise ValueError(f"device '{device}' is not supported; supported: {', '.join(_FACTORIES)}")
    return _FACTORIES[device](model, backend)


def _cpu(model: Model, backend: str) -> Ops:
    from baton.kernels.cpu.build import BuildError, build
    from baton.kernels.cpu.ops import MAX_HEAD_DIM, CpuOps
    from baton.kernels.reference import TorchOps

    if backend != "auto":
        raise UserError(f"--attention-backend {backend} runs on a GPU; give --device cuda, or leave it out")
    reason = ""
    if model.dtype != torch.float32:
        reason = f"they compute in float32, not {str(model.dtype).removeprefix('torch.')}"
    elif model.head_dim % 16 != 0 or model.head_dim > MAX_HEAD_DIM:
        reason = f"head size {model.head_dim} is no multiple of 16 up to {MAX_HEAD_DIM}"
    else:
        try:
            return CpuOps(build(), torch.get_num_threads())
        except (BuildError, OSError) as error:
            reason = str(error)
    if model.batch_invariant:
        raise ValueError(f"--batch-invariant needs the C kernels, which can't be used: {reason}")
    log.warning("C kernels are not used, plain torch operations are (several times slower): %s", reason)
    return TorchOps()


def _cuda(model: Model, backend: str) -> Ops:
    from baton.worker.attention.gpu import make_cuda_ops

    if not 16 <= model.head_dim <= 256:
        raise ValueError(f"head size {model.head_dim} is not served on a GPU, only 16 to 256")
    return make_cuda_ops(model, backend)


_FACTORIES = {"cpu": _cpu, "cuda": _cuda}
