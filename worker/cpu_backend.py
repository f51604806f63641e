"""A worker on CPU cores: steps in a thread, the KV pool in memory that peers can map."""

import functools
import os
from collections.abc import Callable
from pathlib import Path

from baton.kernels.cpu.openmp import give_back_threads
from baton.kv_transfer.contract import Sink, Source
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.transports import open_halves
from baton.proto.config import BatchConfig, CacheConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.network import Network
from baton.worker.backend import Backend, check_pool_size, fill_batch
from baton.worker.blocks import Blocks, SharedBlocks
from baton.worker.kv_pool import HostPool
from baton.worker.model_runner import ModelRunner
from baton.worker.plan import StepPlan, StepResult

OWN = BatchConfig(max_num_batched_tokens=256, max_num_seqs=256, target_itl_ms=0.0, depth=1)
"""Larger chunks gain no speed on a CPU and keep running streams waiting."""
MEMORY_SHARE = 8
"""Without a size given, the pool takes 1 / MEMORY_SHARE of the memory that is free, and at most POOL_BYTES."""
POOL_BYTES = 2**30


class CpuBackend(Backend):
    """See Backend."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config = fill_batch(config, OWN)
        if config.batch.target_itl_ms:
            raise UserError("--target-itl-ms needs --device cuda: on CPU a step's cost is not measured")
        self._runner = ModelRunner(config)
        self.layout, self.max_model_len = self._runner.layout, self._runner.max_model_len
        self.grammars = self._runner.grammars
        self._pool, self.blocks = self._open_pool()
        self.pool_blocks = self._pool.num_blocks
        self.num_blocks = len(self.blocks.join(0))
        check_pool_size(self.num_blocks, config.cache.block_size, self.max_model_len)
        self._runner.attach_pool(self._pool.tensor)
        give_back_threads()  # what follows is computed by the thread that runs the steps

    def _open_pool(self) -> tuple[HostPool, Blocks]:
        block_bytes = self.layout.groups[0].block_bytes
        num_blocks = _num_blocks(self.config.cache, block_bytes)
        if not self.config.keeper:
            return HostPool(self.layout, num_blocks), Blocks(num_blocks)
        blocks = SharedBlocks(self.config)
        with blocks.turn():
            memory = blocks.pool(block_bytes, lambda: num_blocks * self.config.keeper_workers)
        return HostPool(self.layout, memory.num_bytes // block_bytes, memory.handle.decode()), blocks

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """All of the step happens in the call that waits for it."""
        return functools.partial(self._runner.execute, plan)

    def open_transport(self, path: Path, greeting: Greeting, network: Network) -> tuple[Source, Sink]:
        return open_halves(self.config.kv_transfer, self._pool, path, greeting, network)

    def close(self) -> None:
        self._runner.close()
        self._pool.close()
        self.blocks.close()


def _num_blocks(cache: CacheConfig, block_bytes: int) -> int:
    if cache.num_blocks:
        return cache.num_blocks
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return (cache.kv_cache_memory_bytes or min(POOL_BYTES, free // MEMORY_SHARE)) // block_bytes
