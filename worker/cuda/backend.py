"""A worker on a GPU: steps run ahead of the host, the KV pool in device memory."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from baton.kv_transfer.contract import Sink, Source
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.transports import open_halves
from baton.proto.config import BatchConfig, WorkerConfig
from baton.proto.network import Network
from baton.worker.backend import Backend, check_pool_size, fill_batch
from baton.worker.blocks import Blocks, SharedBlocks, cost_key
from baton.worker.cuda.costs import measure_costs
from baton.worker.cuda.memory import GpuPool, measure_pool_blocks, open_gpu, run_largest_steps
from baton.worker.cuda.runner import CudaRunner
from baton.worker.cuda.shared import KeeperMemory
from baton.worker.plan import StepPlan, StepResult
from baton.worker.step_costs import StepCosts

OWN = BatchConfig(max_num_batched_tokens=8192, max_num_seqs=1024, target_itl_ms=15.0, depth=2)
"""Two steps in flight, so that the GPU has the next one when it ends one."""
_MAX_ROWS = 2**31 - 1
"""Of a pool, one for each token, layer and head: prefill kernels count them in 32 bits. Only small heads reach it."""


class CudaBackend(Backend):
    """See Backend."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config = fill_batch(config, OWN)
        if not config.keeper:
            device = open_gpu(config.gpu)
            self._runner = CudaRunner(config)
            num_blocks = self._num_blocks()
            self._start(GpuPool(self._runner.layout, num_blocks, device), Blocks(num_blocks))
            return
        keeper = SharedBlocks(config)
        with keeper.turn():
            device = open_gpu(config.gpu)
            self._runner = CudaRunner(config, KeeperMemory(keeper, device))
            block_bytes = self._runner.layout.groups[0].block_bytes
            memory = keeper.pool(block_bytes, self._num_blocks)
            pool = GpuPool(self._runner.layout, memory.num_bytes // block_bytes, device, memory.handle)
            self._start(pool, keeper)

    def _start(self, pool: GpuPool, blocks: Blocks) -> None:
        """All that is done over the pool before the first request."""
        config = self.config
        self.layout, self.max_model_len = self._runner.layout, self._runner.max_model_len
        self.grammars = self._runner.grammars
        self._pool, self.blocks = pool, blocks
        mine = blocks.join(0)
        self.pool_blocks, self.num_blocks = pool.num_blocks, len(mine)
        check_pool_size(self.num_blocks, config.cache.block_size, self.max_model_len)
        self._runner.attach_pool(pool.tensor)
        self._runner.capture()
        run_largest_steps(self._runner, mine)
        if config.batch.target_itl_ms:
            self.costs = self._costs(mine)

    def _costs(self, mine: Sequence[int]) -> StepCosts | None:
        """Measured once for all workers of a keeper: a later one may have others computing beside it."""
        key = cost_key(self.config)
        if known := self.blocks.note(key):
            return StepCosts.decode(known)
        costs = measure_costs(self._runner, mine)
        if costs is not None:
            self.blocks.take_note(key, costs.encode())
        return costs

    def _num_blocks(self) -> int:
        """For all workers that use the pool."""
        cache, workers = self.config.cache, self.config.keeper_workers
        if cache.num_blocks:
            return cache.num_blocks * workers
        (group,) = self._runner.layout.groups
        if cache.kv_cache_memory_bytes:
            return cache.kv_cache_memory_bytes // group.block_bytes * workers
        return min(measure_pool_blocks(self._runner, self.config), _MAX_ROWS // math.prod(group.shape[:-1]))

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        return self._runner.launch(plan).wait

    def open_transport(self, path: Path, greeting: Greeting, network: Network) -> tuple[Source, Sink]:
        return open_halves(self.config.kv_transfer, self._pool, path, greeting, network)

    def close(self) -> None:
        self._runner.close()
        self._pool.close()
        self.blocks.close()
