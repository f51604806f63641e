"""Which workers share the memory of a device, and the keepers that have it."""

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from baton.frontend.cli.engine_args import gpus_of
from baton.proto import mps
from baton.proto.config import KeeperConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.lifecycle import Role

log = logging.getLogger(__name__)

_KV_PARTS = {Role.PREFILL: 1, Role.DECODE: 3, Role.UNIFIED: 3}
"""How workers on one GPU divide what is left for KV blocks: a prefill worker keeps a prompt's until they are taken."""


def check(args: argparse.Namespace, num_workers: int) -> None:
    """Raises UserError when what was asked for workers on one GPU can't be."""
    if not args.mps:
        return
    gpus = gpus_of(args, num_workers)
    if args.device != "cuda" or len(set(gpus)) == len(gpus):
        raise UserError("--mps is for workers that share a GPU: add --device cuda --gpus 0, or leave it out")
    if not mps.available():
        raise UserError(f"--mps needs {mps.CONTROL}, which comes with NVIDIA's driver and is not in PATH here")


def with_mps(
    workers: Sequence[WorkerConfig], keepers: Sequence[KeeperConfig], run_dir: Path, prefill_percentage: int
) -> tuple[tuple[WorkerConfig, ...], tuple[KeeperConfig, ...]]:
    """The same, as clients of an MPS daemon for each keeper."""
    directories = {keeper.endpoint: str(run_dir / f"{keeper.name}.mps") for keeper in keepers}
    percentage = {Role.PREFILL: prefill_percentage}
    return (
        tuple(
            msgspec.structs.replace(
                worker,
                mps_dir=directories.get(worker.keeper, ""),
                mps_percentage=percentage.get(Role(worker.role), 100),
            )
            for worker in workers
        ),
        tuple(msgspec.structs.replace(keeper, mps_dir=directories[keeper.endpoint]) for keeper in keepers),
    )


def share(
    workers: Sequence[WorkerConfig], endpoint: Callable[[str], str]
) -> tuple[tuple[WorkerConfig, ...], tuple[KeeperConfig, ...]]:
    """The same workers, with a keeper wherever several use one GPU, or were asked to hand over blocks in place.

    `endpoint` gives a process its ZeroMQ endpoint.
    """
    shared = list(workers)
    keepers: list[KeeperConfig] = []
    for indices in _groups(workers):
        group = [workers[index] for index in indices]
        name = f"keeper-{len(keepers)}"
        keepers.append(KeeperConfig(name, endpoint(name), _parts(group), device=group[0].device, gpu=group[0].gpu))
        for index in indices:
            shared[index] = msgspec.structs.replace(
                workers[index], keeper=keepers[-1].endpoint, keeper_workers=len(group)
            )
        _announce(keepers[-1])
    return tuple(shared), tuple(keepers)


def _groups(workers: Sequence[WorkerConfig]) -> list[list[int]]:
    """Indices of workers that share a device's memory."""
    if not workers:
        return []  # they all join later
    first = workers[0]
    if first.device == "cuda":
        places = [[i for i, worker in enumerate(workers) if worker.gpu == gpu] for gpu in {w.gpu for w in workers}]
        return sorted(group for group in places if len(group) > 1)
    split = any(worker.role != Role.UNIFIED for worker in workers)
    return [list(range(len(workers)))] if first.kv_transfer == "local" and split else []


def _parts(group: Sequence[WorkerConfig]) -> dict[str, float]:
    """Each as many blocks as were asked for, or a part by role of what is left."""
    cache = group[0].cache
    given = cache.num_blocks or cache.kv_cache_memory_bytes or group[0].device == "cpu"
    weights = {worker.name: 1 if given else _KV_PARTS[Role(worker.role)] for worker in group}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


def _announce(keeper: KeeperConfig) -> None:
    parts = ", ".join(f"{name} {part:.0%}" for name, part in keeper.parts.items())
    place = f"GPU {keeper.gpu}" if keeper.device == "cuda" else "the KV pool"
    log.info("%s is shared through %s; of the KV blocks get: %s", place, keeper.name, parts)
