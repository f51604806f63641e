"""The OpenMP runtime that torch has loaded and our kernels use too: two would be two thread pools on the same cores."""

import ctypes
from pathlib import Path

_HARD = 2
"""omp_pause_hard: threads are given back, too."""


def loaded_runtime() -> Path | None:
    """Its library in this process's memory. Intel's and LLVM's serve GCC's interface too."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith(("libgomp", "libiomp5", "libomp")):
            return path
    return None


def give_back_threads() -> None:
    """End the threads that wait for this one's next parallel region: another thread will compute from now on. libgomp
    counts them as busy, and with more of them than cores nobody waits actively for more than microseconds."""
    runtime = loaded_runtime()
    try:
        pause = getattr(ctypes.CDLL(str(runtime)), "omp_pause_resource_all", None) if runtime else None
    except OSError:  # its file has been replaced since
        return
    if pause is not None:
        pause(_HARD)
