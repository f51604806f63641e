"""Memory for workers on CPU: anonymous files, which others open through /proc while this process keeps them."""

import os
from pathlib import Path

from baton.keeper.state import Allocator, OutOfMemoryError


class HostAllocator(Allocator):
    """A handle is a path; what has it open or mapped keeps the memory. All pages are allocated at once."""

    def __init__(self) -> None:
        self._files: dict[bytes, int] = {}

    def allocate(self, num_bytes: int) -> bytes:
        """See Allocator."""
        available = _available()
        if num_bytes > available:
            # The kernel would give all that there is, and then kill whoever is the largest.
            raise OutOfMemoryError(f"{num_bytes / 2**20:.0f} MiB do not fit: {available / 2**20:.0f} MiB are free")
        fd = os.memfd_create("baton-kv", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, num_bytes)
        except OSError as error:
            os.close(fd)
            raise OutOfMemoryError(f"{num_bytes / 2**20:.0f} MiB do not fit: {error.strerror}") from error
        handle = f"/proc/{os.getpid()}/fd/{fd}".encode()
        self._files[handle] = fd
        return handle

    def free(self, handle: bytes) -> None:
        """See Allocator."""
        os.close(self._files.pop(handle))


def _available() -> int:
    """Bytes that this machine can still give."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024
