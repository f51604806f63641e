"""NVIDIA's Multi-Process Service: kernels of several processes run on a GPU at once instead of in turns.

A daemon of our own, in a directory of our own, serves the processes that have its directory in their environment.
"""

import os
import shutil
import subprocess

CONTROL = "nvidia-cuda-mps-control"
"""Comes with NVIDIA's driver."""
ANSWER_S = 5.0


def available() -> bool:
    """Whether the daemon's program is installed."""
    return shutil.which(CONTROL) is not None


def environment(directory: str, percentage: int = 100) -> dict[str, str]:
    """For a client that may use this percentage of the multiprocessors, and for the daemon."""
    return {
        "CUDA_MPS_PIPE_DIRECTORY": directory,
        "CUDA_MPS_LOG_DIRECTORY": directory,
        "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": str(percentage),
    }


def ask(directory: str, command: str) -> str | None:
    """The daemon's answer to one of its commands; None when there is none."""
    try:
        done = subprocess.run(
            [CONTROL],
            input=f"{command}\n",
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            env={**os.environ, **environment(directory)},
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def end_client(directory: str, pid: int) -> None:
    """Take a process's work off the GPU. To kill it with work outstanding could take the other clients along."""
    for server in (ask(directory, "get_server_list") or "").split():
        ask(directory, f"terminate_client {server} {pid}")
