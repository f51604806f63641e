"""The bytes of a worker's KV blocks: one block-major tensor."""

import mmap
import os

import torch

from baton.kv_transfer.contract import Pool
from baton.proto.errors import UserError
from baton.proto.layout import KVLayout

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class HostPool:
    """A pool in host memory that other processes can map: an anonymous file, gone with its last user; a keeper's one
    where it has given its `path`.

    `tensor` has shape [num_blocks, *layout.groups[0].shape]; block i is bytes [i, i + 1) * block_bytes of `memfd`.
    All pages are allocated at once, so that a pool too large fails at start and memory does not grow while serving.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, path: str = "") -> None:
        (group,) = layout.groups
        self.layout = layout
        self.num_blocks = num_blocks
        self.block_bytes = group.block_bytes
        size = num_blocks * group.block_bytes
        self.memfd = os.open(path, os.O_RDWR | os.O_CLOEXEC) if path else self._create(size)
        self._mapping = mmap.mmap(self.memfd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.tensor = torch.frombuffer(self._mapping, dtype=DTYPES[group.dtype]).view(num_blocks, *group.shape)

    def _create(self, size: int) -> int:
        memfd = os.memfd_create("baton-kv", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(memfd, 0, size)
        except OSError as error:
            os.close(memfd)
            raise UserError(
                f"the KV pool of {self.num_blocks} blocks ({size / 2**20:.0f} MiB) does not fit: {error.strerror}; "
                "lower --num-blocks or --kv-cache-memory-bytes"
            ) from error
        return memfd

    @property
    def blocks(self) -> Pool:
        """For transports."""
        return Pool(self.tensor.data_ptr(), self.num_blocks, self.block_bytes, memfd=self.memfd)

    def close(self) -> None:
        """Let go of the file; the mapping follows when the last tensor view of it is gone."""
        del self.tensor, self._mapping
        os.close(self.memfd)
