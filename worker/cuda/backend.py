"""A worker on a GPU: steps run ahead of the host, the KV pool in device memory."""

from collections.abc import Callable
from pathlib import Path

from baton.kv_transfer.contract import Sink, Source
from baton.kv_transfer.greeting import Greeting
from baton.kv_transfer.transports import open_halves
from baton.proto.config import BatchConfig, WorkerConfig
from baton.proto.network import Network
from baton.worker.backend import Backend, check_pool_size, fill_batch
from baton.worker.cuda.costs import measure_costs
from baton.worker.cuda.memory import GpuPool, measure_pool_blocks, open_gpu, run_largest_steps
from baton.worker.cuda.runner import CudaRunner
from baton.worker.plan import StepPlan, StepResult

OWN = BatchConfig(max_num_batched_tokens=8192, max_num_seqs=1024, target_itl_ms=15.0, depth=2)
"""Two steps in flight, so that the GPU has the next one when it ends one."""


class CudaBackend(Backend):
    """See Backend."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config = fill_batch(config, OWN)
        open_gpu(config.gpu)
        self._runner = CudaRunner(config)
        self.layout, self.max_model_len = self._runner.layout, self._runner.max_model_len
        self.grammars = self._runner.grammars
        self.num_blocks = self._num_blocks()
        check_pool_size(self.num_blocks, config.cache.block_size, self.max_model_len)
        self._pool = GpuPool(self.layout, self.num_blocks, self._runner.device)
        self._runner.attach_pool(self._pool.tensor)
        self._runner.capture()
        run_largest_steps(self._runner, self.num_blocks)
        if config.batch.target_itl_ms:
            self.costs = measure_costs(self._runner, self.num_blocks)

    def _num_blocks(self) -> int:
        cache = self.config.cache
        if cache.num_blocks:
            return cache.num_blocks
        if cache.kv_cache_memory_bytes:
            return cache.kv_cache_memory_bytes // self.layout.groups[0].block_bytes
        return measure_pool_blocks(self._runner, self.config)

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        return self._runner.launch(plan).wait

    def open_transport(self, path: Path, greeting: Greeting, network: Network) -> tuple[Source, Sink]:
        return open_halves(self.config.kv_transfer, self._pool, path, greeting, network)

    def close(self) -> None:
        self._runner.close()
        self._pool.close()
