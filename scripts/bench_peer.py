#!/usr/bin/env python
"""Scattered KV blocks from a process on one GPU into the pool of another on a second GPU, beside plain copies.

    scripts/bench_peer.py [--transports cuda_ipc nccl] [--sizes 16 64 256 1024] [--json FILE]

GB/s of payload, medians: of one pull or message at a time, and of as many in a row as are POOL of the largest size.
Without GPUs: --transports shm gloo --sizes 16 64.
"""

import argparse
import json
import random
import select
import statistics
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_transfer import Figures, device_seconds, opened, owner_of, scattered, timed
from torch import distributed

from baton.kv_transfer.contract import Pool, Pull
from baton.kv_transfer.sink import PeerSink
from baton.proto.supervision import die_with_parent

MIB = 2**20
BLOCK_BYTES = (2 * MIB, 64 * 2**10)
PROGRAMS = (8, 16, 24, 32, 48, 64, 96, 132)
POOL = 4
"""Of the largest pulls fit into it."""
ROUNDS = 20
WARM_UP = 4


def gb_per_s(num_bytes: int, seconds: list[float]) -> float:
    return num_bytes / statistics.median(seconds[WARM_UP:]) / 1e9


def plain_copy(sizes: list[int]) -> Figures:
    """Of one span: between GPUs, timed by their events, or inside host memory."""
    on_gpus = torch.cuda.device_count() > 1
    figures: Figures = {}
    for size in sizes:
        source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda:1" if on_gpus else "cpu")
        target = torch.empty(size, dtype=torch.uint8, device="cuda:0" if on_gpus else "cpu")

        def copy(target: torch.Tensor = target, source: torch.Tensor = source) -> None:
            target.copy_(source)

        seconds = [device_seconds(copy) if on_gpus else timed(copy) for _ in range(ROUNDS)]
        figures[described(size)] = gb_per_s(size, seconds)
    return figures


def plain_messages(sizes: list[int]) -> Figures:
    """Of one span through torch.distributed (nccl or gloo) alone, from the receive's call to its end."""
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"{folder}/meeting"
        command = [sys.executable, __file__, "--sizes", *(str(size // MIB) for size in sizes), "--send-to", meeting]
        sender = subprocess.Popen(command, preexec_fn=die_with_parent)
        figures = exchange(meeting, 0, sizes)
        sender.wait()
    return figures


def exchange(meeting: str, rank: int, sizes: list[int]) -> Figures:
    """Rank 0 receives, rank 1 sends."""
    on_gpus = torch.cuda.device_count() > 1
    device = torch.device("cuda", rank) if on_gpus else torch.device("cpu")
    if on_gpus:
        torch.cuda.set_device(device)
    distributed.init_process_group(
        "nccl" if on_gpus else "gloo", f"file://{meeting}", timedelta(seconds=60), world_size=2, rank=rank
    )
    figures: Figures = {}
    for size in sizes:
        buffer = torch.zeros(size, dtype=torch.uint8, device=device)

        def cross(count: int, buffer: torch.Tensor = buffer) -> None:
            for _ in range(count):
                if rank:
                    distributed.send(buffer, 0)
                else:
                    distributed.recv(buffer, 1)
            if on_gpus:
                torch.cuda.current_stream().synchronize()

        for count in (1, in_a_row(size, sizes)):
            seconds = [timed(lambda count=count, cross=cross: cross(count)) for _ in range(ROUNDS)]
            figures[described(size, count)] = gb_per_s(count * size, seconds)
    distributed.destroy_process_group()
    return figures


def in_a_row(size: int, sizes: list[int]) -> int:
    """How many of this size are a pool."""
    return POOL * max(sizes) // size


def described(size: int, count: int = 1) -> str:
    return f"{size // MIB} MiB" + (f", {count} in a row" if count > 1 else "")


def pulls_through(transport: str, block_bytes: int, sizes: list[int]) -> Figures:
    """As a worker sees pulls that it starts together, from the first one's start until all have ended."""
    figures: Figures = {}
    with owner_of(transport, block_bytes, POOL * max(sizes), owner_gpu=1) as remote:
        sink = PeerSink(remote.me, [remote.reading], remote.network)

        def parts(whole: Pull, count: int) -> list[Pull]:
            blocks = zip(np.split(whole.source, count), np.split(whole.target, count), strict=True)
            return [Pull(i, remote.owner, source, target) for i, (source, target) in enumerate(blocks)]

        def run(pulls: list[Pull]) -> None:
            for pull in pulls:
                sink.start(pull)
            ended = 0
            while ended < len(pulls):
                select.select([sink], [], [])
                done = sink.completed()
                if any(not each.ok for each in done):
                    raise SystemExit(done)
                ended += len(done)

        for size in sizes:
            count = in_a_row(size, sizes)
            rounds = [parts(scattered(remote.pool.blocks, count * size // block_bytes), count) for _ in range(ROUNDS)]
            seconds = [timed(lambda pulls=pulls: run(pulls)) for pulls in rounds]
            figures[described(size, count)] = gb_per_s(count * size, seconds)
        sink.close()
    return figures


def blocks_through(transport: str, block_bytes: int, sizes: list[int]) -> Figures:
    """As the reader's thread sees a pull, from its begin to its end; where one kernel does it, that alone as well."""
    figures: Figures = {}
    with opened(transport, block_bytes, POOL * max(sizes), owner_gpu=1) as both:
        link, pool = both.link, both.pool
        for size in sizes:
            pulls = [scattered(pool, size // block_bytes) for _ in range(ROUNDS)]
            seconds = [timed(lambda pull=pull: both.copy(pull)) for pull in pulls]
            figures[described(size)] = gb_per_s(size, seconds)
            if transport == "cuda_ipc":
                figures[f"{size // MIB} MiB, kernel"] = kernel(link, pool, size)
        if transport == "cuda_ipc":
            for programs in PROGRAMS:
                figures[f"256 MiB, kernel of {programs} programs"] = kernel(link, pool, 256 * MIB, programs)
        last = scattered(pool, max(sizes) // block_bytes)
        both.copy(last)
        both.check(last)
    return figures


def kernel(link: Any, pool: Pool, size: int, *programs: int) -> float:
    """GB/s of the copy kernel alone."""
    from baton.kernels.cuda.copy import copy_blocks

    seconds = []
    for _ in range(ROUNDS):
        pull = scattered(pool, size // pool.block_bytes)
        pair = (link._theirs.addresses(pull.source), pool.addresses(pull.target))
        jobs = torch.from_numpy(np.stack(pair, axis=1)).cuda()
        seconds.append(device_seconds(lambda jobs=jobs: copy_blocks(jobs, pool.block_bytes, *programs)))
    return gb_per_s(size, seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transports", nargs="+", default=["cuda_ipc", "nccl"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 64, 256, 1024], help="MiB")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--send-to", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = [size * MIB for size in args.sizes]
    if args.send_to:
        exchange(args.send_to, 1, sizes)
        return
    random.seed(0)
    result: Figures = {"plain copy": plain_copy(sizes), "plain messages": plain_messages(sizes)}
    for transport in args.transports:
        for block_bytes in BLOCK_BYTES:
            name = f"{transport}, blocks of {block_bytes // 2**10} KiB"
            result[name] = blocks_through(transport, block_bytes, sizes) | pulls_through(transport, block_bytes, sizes)
            print(name, json.dumps(result[name]), flush=True)
            if args.json:
                args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
