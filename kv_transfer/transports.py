"""The transports by name, as --kv-transfer gives them; config.KV_TRANSFERS says which device has which."""

from pathlib import Path
from typing import Protocol

from baton.kv_transfer.contract import Pool, Transport
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.shm import ShmTransport
from baton.kv_transfer.sink import PeerSink
from baton.kv_transfer.source import PeerSource
from baton.kv_transfer.tcp import TcpTransport
from baton.proto.network import Network

AUTO = {"cpu": ("shm", "tcp"), "cuda": ("cuda_ipc", "nccl", "tcp")}
"""What auto tries, the best first."""


class WorkerPool(Protocol):
    """What workers hold their KV blocks in."""

    @property
    def blocks(self) -> Pool:
        """The bytes."""


def open_halves(
    wanted: str, pool: WorkerPool, path: Path, me: Greeting, network: Network
) -> tuple[PeerSource, PeerSink]:
    """Both halves of a worker: how peers read its pool, through a socket at `path`, and how it reads theirs."""
    transports = open_transports(wanted, pool, path.parent, network)
    return PeerSource(path, me, transports, pool.blocks.memfd, network), PeerSink(me, transports, network)


def open_transports(wanted: str, pool: WorkerPool, folder: Path, network: Network) -> list[Transport]:
    """`wanted` as in WorkerConfig.kv_transfer, the best first; `folder` is private to this user."""
    device = "cpu" if pool.blocks.gpu < 0 else "cuda"
    names = {"auto": AUTO[device], "local": ()}.get(wanted, (wanted,))
    return [_open(name, pool, folder, network) for name in names]


def _open(name: str, pool: WorkerPool, folder: Path, network: Network) -> Transport:
    if name == "shm":
        return ShmTransport(pool.blocks)
    if name == "tcp":
        return TcpTransport(pool.blocks, folder, network)
    if name == "cuda_ipc":
        from baton.kv_transfer.cuda_ipc import CudaIpcTransport

        return CudaIpcTransport(pool.blocks)
    if name == "nccl":
        from baton.kv_transfer.nccl import NcclTransport

        return NcclTransport(pool.blocks)
    from baton.kv_transfer.gloo import GlooTransport

    return GlooTransport(pool.blocks, folder)
