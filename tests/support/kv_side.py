"""One worker as its peers see it on the KV plane: a pool with both halves of a transport, here or in a child."""

import multiprocessing
import os
import select
import signal
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.kv_transfer.contract import Pull, PullDone
from baton.kv_transfer.fetch import FETCH_BYTES
from baton.kv_transfer.gloo import GlooLink
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.tcp import TcpLink
from baton.kv_transfer.transports import open_halves
from baton.proto.curve import FILE_NAME, load_key
from baton.proto.layout import Group, KVLayout
from baton.proto.messages import Peer
from baton.proto.network import Network
from baton.worker.kv_pool import HostPool

NUM_BLOCKS = 2100
SHAPE = (2, 3, 2, 16, 8)
GROUP = Group(
    "full", 3, 16, 2 * 3 * 2 * 16 * 8 * 4, ("kv_heads", "layers", "kv", "tokens", "head_dim"), SHAPE, "float32"
)
LAYOUT = KVLayout("model", (GROUP,))
DEADLINE_S = 30.0
LOOPBACK = "127.0.0.1"


def content(incarnation: int) -> torch.Tensor:
    """What the pool of this incarnation holds at first: [NUM_BLOCKS, *SHAPE]."""
    return torch.randn(NUM_BLOCKS, *SHAPE, generator=torch.Generator().manual_seed(incarnation))


class Side:
    """A worker in this process. `pool.tensor` starts with `content(incarnation)`.

    A kind is a transport after its device: 'shm', 'cuda tcp', 'cuda:1 nccl'; 'far tcp' and 'far cuda tcp' have no Unix
    sockets for their peers, only TCP endpoints that want the key in `folder`. 'small …' copies 8 blocks at a time, so
    that a pull is many pieces.
    """

    def __init__(self, kind: str, folder: Path, name: str, incarnation: int, layout: KVLayout = LAYOUT) -> None:
        far = kind.startswith("far ")
        device, _, transport = kind.removeprefix("far ").removeprefix("small ").rpartition(" ")
        _size_pieces(transport, small=kind.startswith("small "))
        self.pool = _open_pool(device, layout)
        self.network = Network(LOOPBACK, load_key(str(folder / FILE_NAME))) if far else Network()
        if layout.groups == LAYOUT.groups:
            self.pool.tensor.copy_(content(incarnation))
        greeting = Greeting(layout, name, incarnation, NUM_BLOCKS)
        path = folder / f"{name}-{incarnation}.kv"
        self.source, self.sink = open_halves(transport, self.pool, path, greeting, self.network)
        self.peer = Peer(name, incarnation, f"ipc://{name}", self.source.address)
        if far:
            for each in (path, *folder.glob(f"kv-{os.getpid()}-*")):
                each.unlink()  # as for a peer on another host

    def start(self, transfer: int, owner: Peer, source: Sequence[int], target: Sequence[int]) -> None:
        self.sink.start(Pull(transfer, owner, np.array(source), np.array(target)))

    def wait(self, count: int = 1) -> list[PullDone]:
        """At least so many pulls that have ended."""
        done: list[PullDone] = []
        while len(done) < count:
            assert select.select([self.sink], [], [], DEADLINE_S)[0], f"{len(done)} of {count} pulls have ended"
            done += self.sink.completed()
        return done

    def pull(self, owner: Peer, source: Sequence[int], target: Sequence[int]) -> PullDone:
        self.start(1, owner, source, target)
        (done,) = self.wait()
        return done

    def blocks(self) -> torch.Tensor:
        """The pool's content, on the host."""
        return self.pool.tensor.cpu().clone()

    def close(self) -> None:
        self.sink.close()
        self.source.close()
        self.network.close()
        self.pool.close()


def _size_pieces(transport: str, small: bool) -> None:
    """Of this process's links."""
    piece = 8 * GROUP.block_bytes
    if transport == "nccl":
        from baton.kv_transfer import nccl

        nccl._NcclEnd.piece_bytes = piece if small else nccl.FETCH_BYTES
        nccl.NcclLink.edge_bytes = GROUP.block_bytes if small else nccl.EDGE_BYTES
    elif transport == "cuda_ipc":
        from baton.kv_transfer import cuda_ipc

        cuda_ipc.CudaIpcLink.launch_blocks = 8 if small else cuda_ipc.LAUNCH_BLOCKS
    else:
        GlooLink.piece_bytes = TcpLink.piece_bytes = piece if small else FETCH_BYTES


def _open_pool(device: str, layout: KVLayout) -> Any:
    if not device:
        return HostPool(layout, NUM_BLOCKS)
    from baton.worker.cuda.memory import GpuPool, open_gpu

    return GpuPool(layout, NUM_BLOCKS, open_gpu(int(device.partition(":")[2] or 0)))


class Child:
    """A Side in a process of its own, which can be killed."""

    def __init__(self, kind: str, folder: Path, name: str, incarnation: int, fingerprint: str = "model") -> None:
        self._pipe, theirs = _FORKS.Pipe()
        self._process = _FORKS.Process(target=_serve, args=(theirs, kind, folder, name, incarnation, fingerprint))
        self._process.start()
        theirs.close()
        self.peer: Peer = self._pipe.recv()

    def fill(self, block: int, value: float) -> None:
        """Overwrite a block; returns when that is done."""
        self._pipe.send(("fill", block, value))
        self._pipe.recv()

    def start(self, pulls: Sequence[Pull]) -> None:
        """Let it pull; `done` reads what has ended."""
        self._pipe.send(("pull", pulls))

    def done(self) -> PullDone:
        """The next pull of its that ends."""
        return self._pipe.recv()

    def blocks(self) -> torch.Tensor:
        """Its pool's content."""
        self._pipe.send(("blocks",))
        return torch.from_numpy(self._pipe.recv())

    def stop(self) -> None:
        """With SIGSTOP: it is there, and does nothing."""
        assert self._process.pid is not None
        os.kill(self._process.pid, signal.SIGSTOP)

    def free_memory(self) -> int:
        """Bytes that its GPU has left."""
        self._pipe.send(("free",))
        return self._pipe.recv()

    def kill(self) -> None:
        """With SIGKILL."""
        self._process.kill()
        self._process.join()

    def leave(self) -> None:
        """In order."""
        self._pipe.close()
        self._process.join(DEADLINE_S)
        assert self._process.exitcode == 0

    def close(self) -> None:
        """In order, unless it has ended before."""
        self._pipe.close()
        self._process.join(DEADLINE_S)
        self._process.close()


# Children are forks of a process that has imported everything: a start takes milliseconds instead of seconds.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["support.kv_side", "baton.kv_transfer.gloo", "baton.kv_transfer.nccl", "baton.kv_transfer.gpu_mover"]
)


def start_fork_server() -> None:
    """It stays until the tests end."""
    forkserver.ensure_running()


def _serve(pipe: Connection, kind: str, folder: Path, name: str, incarnation: int, fingerprint: str) -> None:
    """One Child, until its pipe ends."""
    side = Side(kind, folder, name, incarnation, KVLayout(fingerprint, LAYOUT.groups))
    pipe.send(side.peer)
    while True:
        ready, _, _ = select.select([pipe, side.sink], [], [])
        if side.sink in ready:
            for done in side.sink.completed():
                pipe.send(done)
        if pipe not in ready:
            continue
        try:
            command, *arguments = pipe.recv()
        except EOFError:
            break
        if command == "fill":
            block, value = arguments
            side.pool.tensor[block] = value
            side.blocks()  # on a GPU: wait for it
            pipe.send(True)
        elif command == "free":
            pipe.send(torch.cuda.mem_get_info()[0])
        elif command == "blocks":
            pipe.send(side.blocks().numpy())
        else:
            for pull in arguments[0]:
                side.sink.start(pull)
    side.close()
