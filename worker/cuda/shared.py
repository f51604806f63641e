"""Memory of a keeper's GPU, mapped into this process: weights that are there once, and the pool of all its workers."""

from typing import Any

import torch

from baton.kv_transfer.cuda_memory import MappedMemory
from baton.worker.blocks import SharedBlocks
from baton.worker.weights.placement import SharedMemory


class KeeperMemory(SharedMemory):
    """The keeper's memories, as tensors. They stay mapped until the process ends."""

    def __init__(self, keeper: SharedBlocks, device: torch.device) -> None:
        self._keeper = keeper
        self._device = device

    def open(self, key: str, num_bytes: int) -> tuple[torch.Tensor, bool]:
        """See SharedMemory."""
        memory = self._keeper.memory(key, num_bytes)
        return device_tensor(MappedMemory(memory.handle).address, memory.num_bytes, self._device), memory.ready

    def filled(self, key: str) -> None:
        """See SharedMemory."""
        self._keeper.filled(key)


def device_tensor(address: int, num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes] over memory that is not torch's; whoever owns it keeps it as long as the tensor."""
    return torch.as_tensor(_ArrayInterface(address, num_bytes), device=device)


class _ArrayInterface:
    def __init__(self, address: int, num_bytes: int) -> None:
        self.__cuda_array_interface__: dict[str, Any] = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }
