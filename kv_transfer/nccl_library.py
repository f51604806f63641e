"""NCCL between two ranks: the few calls of the library that torch has loaded, and their errors.

torch.distributed has the same operations, but takes longer to enqueue one than NVLink takes for 32 MiB, and its groups
come with files and threads of their own. A communicator here is a blocking one: to make it, and its first operation,
wait for the other rank; later ones are enqueued at once. One that does not block would start a thread for each
operation, which takes longer than many a message (docs/performance.md).
"""

import ctypes
import functools
from typing import Any

import torch

UINT8 = 1
SUCCESS = 0
BLOCKING = 1
_MAGIC = 0xCAFEBEEF
_VERSION = 21400
"""Of the configuration below. Later versions have more fields and take their defaults for those that it lacks."""


class _UniqueId(ctypes.Structure):
    """ncclUniqueId: goes by value."""

    _fields_ = (("internal", ctypes.c_char * 128),)


class _Config(ctypes.Structure):
    """ncclConfig_t of version 2.14."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
    )


class NcclError(Exception):
    """A call failed."""


def unique_id() -> bytes:
    """What two ranks must know to meet; this process is where they meet, so it must live until they have."""
    meeting = _UniqueId()
    _call("ncclGetUniqueId", ctypes.byref(meeting))
    return bytes(meeting)


class Communicator:
    """Two ranks on the current devices of their threads, 0 and 1. One call at a time."""

    def __init__(self, meeting: bytes, rank: int) -> None:
        """Meet the other, however long it takes."""
        self._peer = 1 - rank
        self._handle = ctypes.c_void_p()
        config = _Config(ctypes.sizeof(_Config), _MAGIC, _VERSION, BLOCKING)
        _call(
            "ncclCommInitRankConfig",
            ctypes.byref(self._handle),
            2,
            _UniqueId.from_buffer_copy(meeting),
            rank,
            ctypes.byref(config),
        )

    def send(self, address: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Enqueue a message to the other. The first operation connects, for which it waits for the other's."""
        self._transfer("ncclSend", address, num_bytes, stream)

    def recv(self, address: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        """Enqueue the receipt of one of exactly this size."""
        self._transfer("ncclRecv", address, num_bytes, stream)

    def _transfer(self, call: str, address: int, num_bytes: int, stream: torch.cuda.Stream) -> None:
        _call(call, address, num_bytes, UINT8, self._peer, self._handle, stream.cuda_stream)

    def abort(self) -> None:
        """End at once, with whatever is under way on this side."""
        _call("ncclCommAbort", self._handle)


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL("libnccl.so.2")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    library.ncclSend.argtypes = library.ncclRecv.argtypes = (pointer, ctypes.c_size_t, number, number, pointer, pointer)
    return library


def _call(name: str, *arguments: Any) -> None:
    code: int = getattr(_library(), name)(*arguments)
    if code != SUCCESS:
        raise NcclError(_explain(name, code))


def _explain(what: str, code: int) -> str:
    library = _library()
    library.ncclGetErrorString.restype = library.ncclGetLastError.restype = ctypes.c_char_p
    reasons = (library.ncclGetErrorString(code), library.ncclGetLastError(None))
    return f"{what}: {', '.join(each.decode() for each in reasons if each)}"
