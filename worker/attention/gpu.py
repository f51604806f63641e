"""Which kernels compute prompts on a GPU: what can, and of those what was measured to be fastest.

Our own take tiles (kernels/cuda/work.py), in fixed grids that may run in graphs. FlashAttention-3 takes whole sequences
and wants the longest of them from the host, so it computes steps outside of graphs only. Decode rows in all other steps
take our own: FlashAttention-3 is slower there (docs/performance.md, row A5r).
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from baton.kernels.cuda import fa3_attention
from baton.kernels.ops import Ops
from baton.proto.errors import UserError
from baton.worker.attention.model import Model

log = logging.getLogger(__name__)

HOPPER = (9, 0)
"""Compute capability of H100 and H200."""
GLUON_IN_TRITON = "3.6."
"""Gluon is experimental: its names change with every version of Triton. With others the Triton kernel serves."""
_SPEED: Mapping[int, Mapping[str, float]] = {128: {"gluon": 479.0, "fa3": 470.0}}
"""Head size -> TFLOP/s on an H200, bfloat16: geometric mean of 8 × 1,024, 4 × 2,048, 1 × 8,000 and 2,048 tokens after
6,144 cached ones (docs/performance.md). Where nothing was measured, `auto` takes our own."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Kernels for one model on one GPU."""

    tiles: str
    """triton (works everywhere) | gluon (Hopper)."""
    fa3: bool
    """Whether FlashAttention-3 takes the steps with prompts that run outside of graphs."""


@dataclass(frozen=True, slots=True)
class Machine:
    """The current GPU and what is installed."""

    capability: tuple[int, int]
    triton: str
    """Version."""
    fa3: bool
    """Whether the extra is there."""


def choose(model: Model, backend: str, machine: Machine) -> Choice:
    """`backend` as in WorkerConfig. Raises UserError when the GPU, the model or the installation does not suit it."""
    fits_gluon = model.dtype.itemsize == 2 and model.head_dim % 8 == 0 and not model.batch_invariant
    can_gluon = machine.capability == HOPPER and machine.triton.startswith(GLUON_IN_TRITON)
    tiles = "gluon" if fits_gluon and can_gluon else "triton"
    problem = _unsuited_to_fa3(model, machine)
    if backend == "fa3" and problem:
        raise UserError(f"--attention-backend fa3 {problem}")
    return Choice(tiles, fa3=backend == "fa3" or (backend == "auto" and not problem and _fa3_is_faster(model.head_dim)))


def make_cuda_ops(model: Model, backend: str) -> Ops:
    """For the current GPU. Raises UserError as `choose` does."""
    import triton

    from baton.kernels.cuda import attention
    from baton.kernels.cuda.invariant import InvariantOps
    from baton.kernels.cuda.ops import CudaOps

    machine = Machine(torch.cuda.get_device_capability(), triton.__version__, fa3_attention.installed())
    choice = choose(model, backend, machine)
    if model.batch_invariant:
        return InvariantOps()
    prefill = attention.prefill
    if choice.tiles == "gluon":
        from baton.kernels.cuda import hopper_attention

        prefill = hopper_attention.prefill
    log.info("attention over prompts: %s%s", choice.tiles, ", FlashAttention-3 outside of graphs" if choice.fa3 else "")
    return CudaOps(prefill=prefill, takes_sequences=choice.fa3)


def _unsuited_to_fa3(model: Model, machine: Machine) -> str:
    """Why FlashAttention-3 can't be used, or nothing."""
    if machine.capability != HOPPER:
        return f"needs a Hopper GPU (compute capability 9.0), not {'.'.join(map(str, machine.capability))}"
    if model.batch_invariant:
        return "does not keep --batch-invariant"
    if model.dtype.itemsize != 2:
        return f"computes in bfloat16 or float16, not {str(model.dtype).removeprefix('torch.')}; see --dtype"
    if model.head_dim % 8 != 0:
        return f"needs a head size that is a multiple of 8, not {model.head_dim}"
    if model.soft_cap:
        return "has no soft cap on attention scores, which this model needs"
    return "" if machine.fa3 else "is not installed; pip install 'baton-serve[fa3]'"


def _fa3_is_faster(head_dim: int) -> bool:
    speed = _SPEED.get(head_dim)
    return speed is not None and speed["fa3"] > speed["gluon"]
