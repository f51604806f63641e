"""API keys: which there are, what they are called, and whether a client has one.

A key file has a line for each key: its name, blanks, the key. Empty lines and lines that begin with # are passed over.

    # team      key
    search      Jx0V9sS0xWJv8mQ1cY5n
    batch-jobs  p2Q7mZ4tK8wR3vN6bH1d

Nobody but its owner may read it (chmod 600). Whoever changes it need not tell the server: it is read again when it has
changed, and a file that can't be used leaves the keys as they were.
"""

import hashlib
import hmac
import logging
import os
import re
import stat
import time
from contextvars import ContextVar
from pathlib import Path

from baton.proto.errors import UserError

log = logging.getLogger(__name__)

LOOK_INTERVAL_S = 1.0
"""A changed file is noticed after so long at most."""
MAX_FILE_BYTES = 2**20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_KEY = re.compile(r"[!-~]{8,512}")
"""Printable ASCII, as headers can carry it."""

key_name: ContextVar[str] = ContextVar("key_name", default="")
"""The name of the key that came with the request which is being answered; empty without keys."""

_Version = tuple[int, int, int]
"""Changes whenever a file does: inode, time of its last change in ns, size."""


class Keyring:
    """The keys of one server."""

    def __init__(self, keys: tuple[str, ...] = (), file: str = "") -> None:
        """`keys` are called key-1, key-2, …; `file` names a key file, empty: none. Raises UserError."""
        self._given = [(f"key-{number}", _digest(key.encode())) for number, key in enumerate(keys, 1)]
        self._file = Path(file) if file else None
        self._version: _Version | None = None
        self._known = self._given
        self._look_at = 0.0
        if self._file is not None:
            self._read(self._file)

    def __bool__(self) -> bool:
        """Whether a key is asked for at all. A file without keys lets nobody in."""
        return bool(self._given) or self._file is not None

    def name_of(self, key: bytes) -> str | None:
        """The name of a key that a client sent, None when it is not one of ours.

        Every key is compared, and digests of one length, so that the time tells nothing.
        """
        self._look()
        digest, found = _digest(key), None
        for name, known in self._known:
            if hmac.compare_digest(digest, known):
                found = name
        return found

    def _look(self) -> None:
        now = time.monotonic()
        if self._file is None or now < self._look_at:
            return
        self._look_at = now + LOOK_INTERVAL_S
        try:
            if _version(os.stat(self._file)) != self._version:
                self._read(self._file)
                log.info("%s has changed: it has %d API keys now", self._file, len(self._known) - len(self._given))
        except (OSError, UserError) as error:
            log.error("the API keys stay as they were: %s", error)
            self._look_at = now + 10 * LOOK_INTERVAL_S

    def _read(self, path: Path) -> None:
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise UserError(f"can't read the API keys in {path}: {error.strerror}") from error
        if stat.S_IMODE(status.st_mode) & 0o077:
            raise UserError(f"{path} has API keys that others than its owner may read: chmod 600 {path}")
        found = _parse(path, data)
        # Whoever has the name has what belongs to it, such as stored responses.
        if twice := [name for name, _ in self._given if name in found]:
            raise UserError(f"{path} names a key {twice[0]}, as the command line's are called: choose another name")
        self._known = [*self._given, *found.items()]
        self._version = _version(status)


def bearer_key(authorization: bytes) -> bytes:
    """The key in an Authorization header; empty when there is none."""
    scheme, _, key = authorization.partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


def _parse(path: Path, data: bytes) -> dict[str, bytes]:
    """Name -> digest. Raises UserError with the number of the line, and never with what stands there."""
    if len(data) > MAX_FILE_BYTES:
        raise UserError(f"{path} is larger than {MAX_FILE_BYTES} bytes")
    digests: dict[str, bytes] = {}
    for number, line in enumerate(data.decode(errors="replace").splitlines(), 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) != 2 or not _NAME.fullmatch(words[0]) or not _KEY.fullmatch(words[1]):
            raise UserError(
                f"{path}, line {number}: expected 'NAME KEY': a name of letters, digits, '.', '_' and '-' and a key of "
                "8 to 512 printable characters without blanks"
            )
        if words[0] in digests:
            raise UserError(f"{path}, line {number}: a second key has the name {words[0]}")
        digests[words[0]] = _digest(words[1].encode())
    return digests


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _version(status: os.stat_result) -> _Version:
    return status.st_ino, status.st_mtime_ns, status.st_size
