"""The private directory with a deployment's sockets and config files."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Self

LONGEST_PARENT = 40
"""A Unix socket's path has 107 bytes at most; this leaves room for `baton-XXXXXXXX/` and a socket's name."""

_JANITOR = 'read -r _; rm -rf -- "$1"; shift; for path; do [ -S "$path" ] && rm -f -- "$path"; done; exit 0'


class RunDir:
    """A new 0700 directory that is removed at the end, also when this process is killed.

    A child shell waits for the end of a pipe that only this process holds open, and then removes the directory: one
    way out for an orderly end and for `kill -9`.
    """

    def __init__(self, *sockets: str) -> None:
        """`sockets` lie elsewhere and are removed with it: a Unix socket that the user has named, and nothing else."""
        self.path = Path(tempfile.mkdtemp(prefix="baton-", dir=_parent()))
        self._janitor = subprocess.Popen(
            ["/bin/sh", "-c", _JANITOR, "baton-janitor", str(self.path), *sockets],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def endpoint(self, name: str) -> str:
        """ZeroMQ endpoint of a socket in here."""
        return f"ipc://{self.path}/{name}"

    def close(self) -> None:
        """Remove the directory and wait until it is gone."""
        self._janitor.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _parent() -> str:
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    usable = 0 < len(runtime) <= LONGEST_PARENT and os.access(runtime, os.W_OK | os.X_OK)
    return runtime if usable else "/tmp"
