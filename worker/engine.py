"""A worker's parts put together without any socket: for the worker process and for offline use."""

import functools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from baton.kv_transfer.contract import Sink, Source
from baton.kv_transfer.none import NoSink, NoSource
from baton.kv_transfer.shm import Greeting, ShmSink, ShmSource
from baton.proto.config import BatchConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.lifecycle import Role
from baton.proto.messages import CancelStream, Peer, SamplingParams, Sid, StartPrefill
from baton.worker.batcher import Batcher
from baton.worker.device import Device
from baton.worker.effects import Emit
from baton.worker.kv_pool import HostPool
from baton.worker.model_runner import ModelRunner
from baton.worker.plan import StepPlan, StepResult

CPU_TOKEN_BUDGET = 256
"""Larger chunks gain no speed on a CPU and keep running streams waiting."""
CUDA_TOKEN_BUDGET = 8192
CUDA_DEPTH = 2
"""Steps in flight, so that a GPU has the next one when it ends one."""
CPU_MEMORY_SHARE = 8
"""Without a size given, the pool takes 1 / CPU_MEMORY_SHARE of the memory that is free, and at most CPU_POOL_BYTES."""
CPU_POOL_BYTES = 2**30


class Core:
    """Model and pool, alive as long as the process; batchers come and go with the worker's incarnations."""

    def __init__(self, config: WorkerConfig) -> None:
        if config.device == "cuda" and config.role != Role.UNIFIED:
            raise UserError(f"a {config.role} worker can't run on a GPU yet: KV blocks move between CPU workers only")
        self.config = config
        self.batch = _batch_config(config.batch, config.device)
        self.runner: Any = _make_runner(config, self.batch)
        self.layout = self.runner.layout
        self.max_model_len = self.runner.max_model_len
        self.num_blocks = self._num_blocks()
        self.pool: Any = self._make_pool()
        self.runner.attach_pool(self.pool.tensor)
        if config.device == "cuda":
            self.runner.capture()

    def launch(self, plan: StepPlan) -> Callable[[], StepResult]:
        """Begin a step; what is returned waits for its end. On a CPU that is when all of it happens."""
        if self.config.device == "cuda":
            return self.runner.launch(plan).wait
        return functools.partial(self.runner.execute, plan)

    def new_device(self) -> Any:
        """What the worker's loop submits steps to (device.Device)."""
        if self.config.device == "cuda":
            from baton.worker.cuda.device import CudaDevice

            return CudaDevice(self.runner)
        return Device(self.runner)

    def open_transport(self, path: Path, greeting: Greeting) -> tuple[Source, Sink]:
        """How peers read this worker's pool, through a socket at `path`, and how it reads theirs."""
        if self.config.device == "cuda":
            return NoSource(), NoSink()
        return ShmSource(path, greeting, self.pool.memfd), ShmSink(greeting, self.pool.address, self.pool.block_bytes)

    def new_batcher(self, me: Peer) -> Batcher:
        """A batcher over the whole pool, with nothing in it."""
        return Batcher(
            me,
            self.num_blocks,
            self.max_model_len,
            self.config.cache,
            self.batch,
            self.config.lease,
            self.config.early_bind_tokens,
        )

    def _num_blocks(self) -> int:
        cache = self.config.cache
        block_bytes = self.layout.groups[0].block_bytes
        longest = -(-self.max_model_len // cache.block_size)
        count = cache.num_blocks
        if not count and self.config.device == "cuda" and not cache.kv_cache_memory_bytes:
            from baton.worker.cuda.memory import measure_pool_blocks

            count = measure_pool_blocks(self.runner, cache, self.batch.max_num_batched_tokens, self.batch.max_num_seqs)
        elif not count:
            wanted = cache.kv_cache_memory_bytes or min(CPU_POOL_BYTES, _free_memory() // CPU_MEMORY_SHARE)
            count = wanted // block_bytes
        if count < longest:
            raise UserError(
                f"the KV pool of {count} blocks holds {count * cache.block_size} tokens, fewer than max_model_len "
                f"{self.max_model_len}: give --num-blocks {longest} or more, or lower --max-model-len"
            )
        return count

    def _make_pool(self) -> Any:
        if self.config.device == "cuda":
            from baton.worker.cuda.memory import GpuPool

            return GpuPool(self.layout, self.num_blocks, self.runner.device)
        return HostPool(self.layout, self.num_blocks)

    def close(self) -> None:
        """Let go of the pool."""
        self.pool.close()


class Engine:
    """One unified worker in this process, driven by `step`: what the offline LLM class stands on."""

    def __init__(self, config: WorkerConfig) -> None:
        self._core = Core(config)
        self._batcher = self._core.new_batcher(Peer("offline", 1, "", ""))
        self.max_model_len = self._core.max_model_len
        self._cmd_seq = 0
        self._in_flight: deque[Callable[[], StepResult]] = deque()

    def add(self, sid: Sid, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        """Queue a stream. Raises ValueError when the prompt leaves no room for output."""
        if not 0 < len(prompt_ids) < self.max_model_len:
            raise ValueError(f"a prompt must have 1 to {self.max_model_len - 1} tokens, this one has {len(prompt_ids)}")
        self._cmd_seq += 1
        tokens = np.asarray(prompt_ids, dtype=np.int32)
        command = StartPrefill(
            epoch=1,
            cmd_seq=self._cmd_seq,
            sid=sid,
            attempt=1,
            prompt_len=len(tokens),
            params=params,
            reply_to="",
            continue_decode=True,
        )
        self._batcher.handle(command, (tokens.tobytes(), pack_hashes(hash_chain(tokens))), time.monotonic())

    def abort(self, sid: Sid) -> None:
        """Drop a stream; no further row of it comes."""
        self._batcher.handle(CancelStream(sid, 1), (), time.monotonic())

    def step(self) -> list[Emit]:
        """Bring the oldest step to its end, others in flight, and return its rows; empty when nothing is to run."""
        now = time.monotonic()
        self._batcher.tick(now)
        while (plan := self._batcher.schedule(now)) is not None:
            self._in_flight.append(self._core.launch(plan))
        if not self._in_flight:
            return []
        self._batcher.complete(self._in_flight.popleft()(), time.monotonic())
        rows = [effect for effect in self._batcher.outbox if isinstance(effect, Emit)]
        self._batcher.outbox.clear()
        return rows

    @property
    def batcher(self) -> Batcher:
        """For tests and benchmarks that look at the pool and the counters."""
        return self._batcher

    def close(self) -> None:
        """End the steps in flight and free the pool."""
        while self._in_flight:
            self._in_flight.popleft()()
        self._core.close()


def _make_runner(config: WorkerConfig, batch: BatchConfig) -> Any:
    if config.device != "cuda":
        return ModelRunner(config)
    from baton.worker.cuda.memory import open_gpu
    from baton.worker.cuda.runner import CudaRunner

    open_gpu(config.gpu)
    return CudaRunner(config, batch.max_num_batched_tokens, batch.depth)


def _batch_config(batch: BatchConfig, device: str) -> BatchConfig:
    """`batch` with what it leaves to the device filled in."""
    budget, depth = (CUDA_TOKEN_BUDGET, CUDA_DEPTH) if device == "cuda" else (CPU_TOKEN_BUDGET, 1)
    return msgspec.structs.replace(
        batch,
        max_num_batched_tokens=batch.max_num_batched_tokens or max(budget, batch.max_num_seqs),
        depth=batch.depth or depth,
    )


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
