"""Safetensors to the GPU: threads read slices of the files into pinned buffers, whose copies to the device overlap.

One thread that maps a file and copies page by page gets 4 to 6 GB/s; several that read into pinned memory are limited
by the page cache or the bus.
"""

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import nn

from baton.worker.weights.loader import LoadError, checked_targets, weight_files

_THREADS = 8
_PIECE_BYTES = 16 * 2**20
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class _Stored:
    """One tensor of a file."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int


class _Staging:
    """A pinned buffer and the stream that empties it."""

    def __init__(self, device: torch.device) -> None:
        self._buffer = torch.empty(_PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._view = memoryview(self._buffer.numpy())  # type: ignore[arg-type]
        self._stream = torch.cuda.Stream(device)

    def copy(self, fd: int, offset: int, target: torch.Tensor, dtype: torch.dtype) -> None:
        """Bytes of the file, elements of `dtype`, into the dense target."""
        size = target.numel() * dtype.itemsize
        self._stream.synchronize()  # the buffer's copy before this one
        done = 0
        while done < size:
            count = os.preadv(fd, [self._view[done:size]], offset + done)
            if count == 0:
                raise LoadError("a safetensors file ends before its tensors do")
            done += count
        with torch.cuda.stream(self._stream):
            target.copy_(self._buffer[:size].view(dtype), non_blocking=True)


def load_checkpoint_to_gpu(model: nn.Module, directory: Path) -> None:
    """Fill every parameter of `model`. Raises LoadError on a missing, unexpected or mis-shaped tensor."""
    device = next(model.parameters()).device
    stored = [tensor for file in weight_files(directory) for tensor in _read_header(file)]
    targets = checked_targets(model, {tensor.name: tensor.shape for tensor in stored})
    files = {file: os.open(file, os.O_RDONLY) for file in {tensor.file for tensor in stored}}
    free: SimpleQueue[_Staging] = SimpleQueue()
    for _ in range(_THREADS):
        free.put(_Staging(device))

    def copy(piece: tuple[_Stored, int, torch.Tensor]) -> None:
        tensor, offset, target = piece
        staging = free.get()
        try:
            staging.copy(files[tensor.file], offset, target, tensor.dtype)
        finally:
            free.put(staging)

    try:
        # A thread begins on the first GPU, and would open it for good.
        with ThreadPoolExecutor(_THREADS, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
            for _ in pool.map(copy, _pieces(stored, targets)):
                pass
        torch.cuda.synchronize(device)
    finally:
        for fd in files.values():
            os.close(fd)


def _pieces(stored: list[_Stored], targets: dict[str, torch.Tensor]) -> Iterator[tuple[_Stored, int, torch.Tensor]]:
    """(tensor, offset in its file, the elements of the target that start there)."""
    for tensor in stored:
        if tensor.name in targets:
            flat = targets[tensor.name].view(-1)
            width = tensor.dtype.itemsize
            step = _PIECE_BYTES // width
            for start in range(0, flat.numel(), step):
                yield tensor, tensor.offset + start * width, flat[start : start + step]


def _read_header(file: Path) -> list[_Stored]:
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        return [
            _Stored(name, file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError(f"{file} is not a safetensors file that can be read: {error!r}") from error
