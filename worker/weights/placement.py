"""Memory for a model's parameters, which are made without: one tensor each, or all of them in one arena.

The arena's layout follows from the names, shapes and dtypes alone, in the order of the model, so that two processes
that build the same model find the same parameter in the same place.
"""

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import nn

ALIGNMENT = 256
"""Bytes: as aligned as what the device's own allocator returns."""


class SharedMemory(ABC):
    """Memory that other processes use too."""

    @abstractmethod
    def open(self, key: str, num_bytes: int) -> tuple[torch.Tensor, bool]:
        """uint8 [num_bytes] under this key, and whether it has been filled before."""

    @abstractmethod
    def filled(self, key: str) -> None:
        """It holds what its key says."""


def place(model: nn.Module, device: torch.device) -> None:
    """Give each parameter memory of its own, not initialised."""
    for module, name, parameter in _parameters(model):
        _set(module, name, torch.empty_like(parameter, device=device))


def place_in(model: nn.Module, arena: torch.Tensor) -> None:
    """Let each parameter be a part of `arena`, uint8 [arena_bytes(model)]."""
    offset = 0
    for module, name, parameter in _parameters(model):
        part = arena[offset : offset + parameter.nbytes]
        _set(module, name, part.view(parameter.dtype).view(parameter.shape))
        offset += _aligned(parameter.nbytes)


def arena_bytes(model: nn.Module) -> int:
    """All parameters, each aligned."""
    return sum(_aligned(parameter.nbytes) for _, _, parameter in _parameters(model))


def arena_key(model: nn.Module, fingerprint: str) -> str:
    """`fingerprint` of the checkpoint, and of where its parameters lie."""
    table = [(name, list(value.shape), str(value.dtype)) for name, value in model.named_parameters()]
    return f"weights/{fingerprint}/{hashlib.blake2b(repr(table).encode(), digest_size=8).hexdigest()}"


def _parameters(model: nn.Module) -> list[tuple[nn.Module, str, nn.Parameter]]:
    return [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
    ]


def _set(module: nn.Module, name: str, value: torch.Tensor) -> None:
    setattr(module, name, nn.Parameter(value, requires_grad=False))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
