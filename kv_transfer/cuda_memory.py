"""GPU memory that other processes can map: the few calls of the CUDA driver that torch does not offer.

torch's allocator hands out parts of larger segments, which may grow and move, and such a part can't be exported by
itself. The driver library has one name whatever the version of the toolkit. All calls act on the calling thread's
current device, in the context that torch uses too, or that `use_gpu` has made current where there is no torch.
"""

import ctypes
import functools
from typing import Any

GRANULARITY = 2 * 2**20
"""The driver maps pages of this size: a smaller allocation would share its page, and export what lies beside it."""
OUT_OF_MEMORY = 2
_LAZY_PEER_ACCESS = 1
_HANDLE_BYTES = 64


class _Handle(ctypes.Structure):
    """CUipcMemHandle: goes by value."""

    _fields_ = (("reserved", ctypes.c_char * _HANDLE_BYTES),)


class CudaError(Exception):
    """A driver call failed."""

    def __init__(self, call: str, code: int) -> None:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(code, ctypes.byref(name))
        super().__init__(f"{call}: {(name.value or b'error').decode()} ({code})")
        self.code = code


def use_gpu(index: int) -> None:
    """Make a GPU, by its index among the visible ones, current for this thread. Raises OSError without a driver."""
    _call("cuInit", ctypes.c_uint(0))
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(index))
    _call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    _call("cuCtxSetCurrent", context)


class ExportedMemory:
    """`size` bytes on the current device from `address`, zeroed; memory that peers have mapped outlives `close`."""

    def __init__(self, size: int) -> None:
        self.size = size
        pointer = ctypes.c_uint64()
        _call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(-(-size // GRANULARITY) * GRANULARITY))
        self.address = pointer.value
        _call("cuMemsetD8_v2", ctypes.c_uint64(self.address), ctypes.c_ubyte(0), ctypes.c_size_t(size))
        _call("cuCtxSynchronize")  # another process may write at once

    def close(self) -> None:
        """Give the memory back, once every kernel that uses it has ended."""
        _call("cuMemFree_v2", ctypes.c_uint64(self.address))


def enqueue_upload(target: int, source: int, num_bytes: int, stream: int) -> None:
    """Copy from pinned memory of the host to the current device's, in the order of a stream, given by its handle."""
    size = ctypes.c_size_t(num_bytes)
    _call("cuMemcpyHtoDAsync_v2", ctypes.c_uint64(target), ctypes.c_void_p(source), size, ctypes.c_void_p(stream))


def export(address: int) -> bytes:
    """What a peer needs to map the ExportedMemory at `address`."""
    handle = _Handle()
    _call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
    return bytes(handle)


class MappedMemory:
    """A peer's ExportedMemory from `address`, by what `export` said; valid until `close`, also when the peer dies."""

    def __init__(self, handle: bytes) -> None:
        pointer = ctypes.c_uint64()
        _call(
            "cuIpcOpenMemHandle_v2",
            ctypes.byref(pointer),
            _Handle.from_buffer_copy(handle),
            ctypes.c_uint(_LAZY_PEER_ACCESS),
        )
        self.address = pointer.value

    def close(self) -> None:
        """Unmap, once every kernel that reads it has ended."""
        _call("cuIpcCloseMemHandle", ctypes.c_uint64(self.address))


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code:
        raise CudaError(name, code)
