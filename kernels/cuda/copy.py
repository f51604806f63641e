"""Copying scattered blocks: the KV of a handoff, out of a peer's pool and into ours."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

CHUNK_BYTES = 32768
WARPS = 32
PROGRAMS = 96
"""Of 1,024 threads each: enough for the full bandwidth of a GPU with 132 multiprocessors (docs/performance.md)."""
PEER_PROGRAMS = 32
"""Enough for NVLink."""


@triton.jit(do_not_specialize=["num_chunks"])
def _copy_blocks(jobs_ptr, num_chunks, CHUNKS_PER_BLOCK: tl.constexpr, CHUNK_WORDS: tl.constexpr):
    """A fixed number of programs walks over all chunks. A chunk is one round of 16-byte loads, then of stores."""
    words = tl.arange(0, CHUNK_WORDS)
    for chunk in range(tl.program_id(0), num_chunks, tl.num_programs(0)):
        job = jobs_ptr + (chunk // CHUNKS_PER_BLOCK) * 2
        offset = (chunk % CHUNKS_PER_BLOCK) * CHUNK_WORDS
        source = tl.multiple_of(tl.load(job).to(tl.pointer_type(tl.int32)), 16) + offset
        target = tl.multiple_of(tl.load(job + 1).to(tl.pointer_type(tl.int32)), 16) + offset
        # Nothing here is read twice: it should not push what decode steps read out of the cache.
        values = tl.load(source + words, eviction_policy="evict_first")
        tl.store(target + words, values, eviction_policy="evict_first")


def copy_blocks(jobs: torch.Tensor, block_bytes: int, programs: int = PROGRAMS) -> Any:
    """Copy blocks between addresses: jobs int64 [n, 2] of (source, target), multiples of 16, no target in two jobs.

    One launch of so many programs whatever the number of blocks, a multiple of 64 bytes each, so that steps beside it
    keep the rest of the GPU. Sources may lie in a peer's memory. The reference is `reference.copy_blocks`. Returns the
    compiled kernel.
    """
    chunk, per_block = _chunks(block_bytes)
    warps = max(1, min(WARPS, chunk // 512))
    return _copy_blocks[(programs,)](jobs, len(jobs) * per_block, per_block, chunk // 4, num_warps=warps)


def prepare_copy(block_bytes: int) -> Callable[[int, int, int, int], None]:
    """copy_blocks on the current device, compiled and bound: a launch takes the host a sixth of the time.

    What it returns takes the address of jobs, how many they are, how many programs, and the handle of a stream.
    """
    chunk, per_block = _chunks(block_bytes)
    kernel = copy_blocks(torch.empty(0, 2, dtype=torch.int64, device="cuda"), block_bytes)
    by = functools.cache(lambda programs: kernel[programs, 1, 1])

    def launch(jobs: int, count: int, programs: int, stream: int) -> None:
        by(programs)(jobs, count * per_block, per_block, chunk // 4, stream=stream)

    return launch


def _chunks(block_bytes: int) -> tuple[int, int]:
    """(bytes of a chunk, chunks of a block)"""
    chunk = math.gcd(block_bytes, CHUNK_BYTES)
    return chunk, block_bytes // chunk
