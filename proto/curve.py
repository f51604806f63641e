"""The key of a cluster that spans hosts.

A cluster has one pair of CURVE keys (ZeroMQ RFC 26), and each of its processes has both halves, from a file that is
copied to every host. A process that listens shows by its answer that it has the secret half; one that connects proves
the same, and is let in only then. Whoever has the file belongs to the cluster, and nobody else reads or writes a byte.

Keys are never logged, and travel in no message and in no configuration: those have the file's path.
"""

import os
import threading
from dataclasses import dataclass
from pathlib import Path

import zmq
from zmq.auth import load_certificate
from zmq.utils import z85

from baton.proto.errors import UserError

FILE_NAME = "cluster.key"
_OTHERS = 0o077
_TEXT = """\
#   The key of a Baton cluster, as a ZeroMQ CURVE certificate. Whoever has it belongs to the cluster: keep it secret.
metadata
curve
    public-key = "{public}"
    secret-key = "{secret}"
"""


@dataclass(frozen=True, slots=True, repr=False)
class ClusterKey:
    """Both halves, in Z85."""

    public: bytes
    secret: bytes

    def serve(self, socket: zmq.Socket) -> None:
        """Sockets that `socket` binds from now on take nobody without the key."""
        socket.curve_server = True
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret

    def use(self, socket: zmq.Socket) -> None:
        """Connections that `socket` makes from now on go to nobody without the key."""
        socket.curve_serverkey = self.public
        socket.curve_publickey, socket.curve_secretkey = self.public, self.secret


def create_key(directory: Path) -> Path:
    """Write a new key into `directory`, which is made when it is missing; the file. Raises UserError."""
    public, secret = zmq.curve_keypair()
    path = directory / FILE_NAME
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(_TEXT.format(public=public.decode(), secret=secret.decode()))
    except FileExistsError as error:
        raise UserError(f"{path} exists already: give another directory, or remove it if nobody uses it") from error
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    return path


def load_key(path: str) -> ClusterKey:
    """The key in a file of `create_key`. Raises UserError, also when others may read it."""
    public: bytes | None
    secret: bytes | None
    try:
        status = os.stat(path)
        if status.st_mode & _OTHERS:
            mode = status.st_mode & 0o777
            raise UserError(f"--key-file {path} may be read or written by others (mode {mode:04o}): chmod 600 {path}")
        if status.st_uid not in (os.geteuid(), 0):
            raise UserError(f"--key-file {path} belongs to another user")
        public, secret = load_certificate(path)
    except OSError as error:
        raise UserError(f"--key-file {path}: {error.strerror or error}; `baton keys new DIR` makes one") from error
    except (ValueError, UnicodeDecodeError):
        public = secret = None
    if public is None or secret is None or not _belong_together(public, secret):
        raise UserError(f"--key-file {path} is not a whole key file: `baton keys new DIR` makes one")
    return ClusterKey(public, secret)


def _belong_together(public: bytes, secret: bytes) -> bool:
    try:
        return zmq.curve_public(secret) == public
    except (zmq.ZMQError, ValueError):
        return False


def admit(context: zmq.Context, key: ClusterKey) -> threading.Thread:
    """Have a context's sockets that were given to `key.serve` let in the holders of `key` alone.

    ZeroMQ asks over a socket of the context whom to let in (ZAP, RFC 27). The thread that answers ends with it.
    """
    # A shadow has its own list of sockets: destroy() of the context closes none that this thread uses.
    door: zmq.Socket = zmq.Context.shadow(context.underlying).socket(zmq.ROUTER)
    door.bind("inproc://zeromq.zap.01")
    thread = threading.Thread(target=_answer, args=(door, z85.decode(key.public)), name="zap", daemon=True)
    thread.start()
    return thread


def _answer(door: zmq.Socket, wanted: bytes) -> None:
    try:
        while True:
            asker, _, version, request, _domain, _address, _identity, mechanism, *shown = door.recv_multipart()
            right = mechanism == b"CURVE" and shown == [wanted]
            verdict = (b"200", b"OK") if right else (b"400", b"another key")
            door.send_multipart([asker, b"", version, request, *verdict, b"", b""])
    except zmq.ContextTerminated:
        door.close(0)
