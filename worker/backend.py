"""What a kind of device brings to a worker: a loaded model, a KV pool, a way to run steps and a way to share blocks."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path

import msgspec

from baton.kv_transfer.contract import Sink, Source
from baton.kv_transfer.greeting import Greeting
from baton.proto.config import BatchConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.layout import KVLayout
from baton.proto.messages import Peer
from baton.proto.network import Network
from baton.worker.batcher import Batcher
from baton.worker.blocks import Blocks
from baton.worker.grammar_compiler import GrammarCompiler
from baton.worker.plan import StepPlan, StepResult
from baton.worker.step_costs import StepCosts


class Backend(ABC):
    """Model and pool, alive as long as the process; batchers come and go with the worker's incarnations."""

    config: WorkerConfig
    """With what it leaves to the device filled in."""
    layout: KVLayout
    max_model_len: int
    num_blocks: int
    """That are this worker's own."""
    pool_blocks: int
    """Of the pool that they lie in."""
    blocks: Blocks
    """Which ones they are."""
    grammars: GrammarCompiler
    """Of this model, shared by the worker's loop and the runner."""
    costs: StepCosts | None = None
    """Of this device's steps, when there is a target time between tokens to keep."""

    @abstractmethod
    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step; what is returned waits for its end."""

    @abstractmethod
    def open_transport(self, path: Path, greeting: Greeting, network: Network) -> tuple[Source, Sink]:
        """How peers read this worker's pool, through a socket at `path`, and how it reads theirs."""

    @abstractmethod
    def close(self) -> None:
        """Let go of the pool and of the runner's threads."""

    def new_batcher(self, me: Peer) -> Batcher:
        """A batcher over this worker's blocks, with nothing in them."""
        return Batcher(
            me,
            self.blocks.join(me.incarnation),
            self.max_model_len,
            self.config.cache,
            self.config.batch,
            self.config.lease,
            self.config.early_bind_tokens,
            self.costs,
            shares_device=bool(self.config.keeper) and not self.config.mps_dir,
        )


def open_backend(config: WorkerConfig) -> Backend:
    """Load the model of `config` on its device. Raises UserError or ValueError when that can't be done."""
    return backend_class(config)(config)


def backend_class(config: WorkerConfig) -> Callable[[WorkerConfig], Backend]:
    """Of the device, with all that it imports, which takes seconds. Raises UserError when something is missing."""
    if config.device == "cuda":
        try:
            from baton.worker.cuda.backend import CudaBackend
        except ImportError as error:
            if (error.name or "").startswith("baton."):
                raise
            raise UserError(
                f"--device cuda needs {error.name or error}; install the extra cuda, pip install 'baton-serve[cuda]', "
                "and PyTorch for CUDA"
            ) from error
        return CudaBackend
    from baton.worker.cpu_backend import CpuBackend

    return CpuBackend


def fill_batch(config: WorkerConfig, own: BatchConfig) -> WorkerConfig:
    """`config` with the device's `own` values where its batch leaves them to it. Raises UserError where a step has no
    token for each of its streams: the last ones would never have one."""
    batch = config.batch
    max_num_seqs = batch.max_num_seqs or min(own.max_num_seqs, batch.max_num_batched_tokens or own.max_num_seqs)
    if 0 < batch.max_num_batched_tokens < max_num_seqs:
        raise UserError(
            f"--max-num-batched-tokens {batch.max_num_batched_tokens} is below --max-num-seqs {max_num_seqs}: a step "
            "needs a token for each stream"
        )
    filled = msgspec.structs.replace(
        batch,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=batch.max_num_batched_tokens or max(own.max_num_batched_tokens, max_num_seqs),
        target_itl_ms=own.target_itl_ms if batch.target_itl_ms is None else batch.target_itl_ms,
        depth=batch.depth or own.depth,
    )
    return msgspec.structs.replace(config, batch=filled)


def check_pool_size(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Raises UserError unless the longest sequence fits."""
    longest = -(-max_model_len // block_size)
    if num_blocks < longest:
        raise UserError(
            f"the KV pool of {num_blocks} blocks holds {num_blocks * block_size} tokens, fewer than max_model_len "
            f"{max_model_len}: give --num-blocks {longest} or more, or lower --max-model-len"
        )
