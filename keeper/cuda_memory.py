"""Memory of a GPU, through the driver alone: a process without torch is there at once and takes little of the GPU."""

from baton.keeper.state import Allocator, OutOfMemoryError
from baton.kv_transfer.cuda_memory import OUT_OF_MEMORY, CudaError, ExportedMemory, export, use_gpu
from baton.proto.errors import UserError


class CudaAllocator(Allocator):
    """A handle is the driver's; what has it mapped can use it also after this process has freed it or died."""

    def __init__(self, gpu: int) -> None:
        """`gpu`: its index among those that are visible. Raises UserError when it can't be used."""
        try:
            use_gpu(gpu)
        except (OSError, CudaError) as error:
            raise UserError(f"GPU {gpu} can't be used: {error}") from error
        self._memories: dict[bytes, ExportedMemory] = {}

    def allocate(self, num_bytes: int) -> bytes:
        """See Allocator."""
        try:
            memory = ExportedMemory(num_bytes)
        except CudaError as error:
            if error.code != OUT_OF_MEMORY:
                raise
            raise OutOfMemoryError(f"{num_bytes / 2**30:.1f} GiB do not fit on the GPU") from error
        handle = export(memory.address)
        self._memories[handle] = memory
        return handle

    def free(self, handle: bytes) -> None:
        """See Allocator."""
        self._memories.pop(handle).close()
