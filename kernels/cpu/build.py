"""Compile the C kernels with the system's compiler on first use, into the user's cache.

The library is keyed by sources, flags, compiler and processor, built in a temporary directory under a lock and renamed
into place, so that many processes may start at once. It links against the OpenMP runtime that torch has loaded.
"""

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from baton.kernels.cpu.openmp import loaded_runtime

SOURCES = ("linear.c", "elementwise.c", "attention.c", "sample.c")
HEADERS = ("vec.h",)
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-ffp-contract=fast", "-fopenmp", "-fPIC")


class BuildError(RuntimeError):
    """The kernels can't be compiled here; the message says why."""


def build() -> Path:
    """Path of the shared library, compiled now if the cache lacks it. Raises BuildError."""
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")
    if compiler is None:
        raise BuildError("no C compiler found (gcc or cc)")
    openmp = loaded_runtime()
    if openmp is None:
        raise BuildError("no OpenMP runtime is loaded (import torch first)")
    target = _cache_dir() / f"cpu-{_key(compiler, openmp)}.so"
    if not target.is_file():
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.is_file():
                _compile(compiler, openmp, target)
    return target


def _compile(compiler: str, openmp: Path, target: Path) -> None:
    here = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        objects = [str(Path(scratch) / source.replace(".c", ".o")) for source in SOURCES]
        for source, output in zip(SOURCES, objects, strict=True):
            _run([compiler, *FLAGS, "-c", str(here / source), "-o", output])
        library = Path(scratch) / target.name
        _run([compiler, "-shared", *objects, "-o", str(library), "-Wl,--no-as-needed", str(openmp), "-lm"])
        os.rename(library, target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{command[0]} failed: {error}") from error
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise BuildError(f"{command[0]} failed: {errors[0]}")


def _key(compiler: str, openmp: Path) -> str:
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout
    parts = [version, *FLAGS, openmp.name, _cpu_flags()]
    state = hashlib.blake2b("\n".join(parts).encode(), digest_size=8)
    for name in (*SOURCES, *HEADERS):
        state.update((here / name).read_bytes())
    return state.hexdigest()


def _cpu_flags() -> str:
    """What -march=native depends on: a cache directory may be shared by different machines."""
    flags = {line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith(("flags", "Features"))}
    return platform.machine() + "".join(sorted(flags))


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "baton" / "kernels"
