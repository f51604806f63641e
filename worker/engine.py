"""A worker's parts put together without any socket: for the worker process and for offline use."""

import os
import time
from collections.abc import Sequence

import msgspec
import numpy as np

from baton.proto.config import BatchConfig, WorkerConfig
from baton.proto.errors import UserError
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.messages import CancelStream, Peer, SamplingParams, Sid, StartPrefill
from baton.worker.batcher import Batcher
from baton.worker.effects import Emit
from baton.worker.kv_pool import HostPool
from baton.worker.model_runner import ModelRunner

CPU_TOKEN_BUDGET = 256
"""Larger chunks gain no speed on a CPU and keep running streams waiting."""
CPU_MEMORY_SHARE = 8
"""Without a size given, the pool takes 1 / CPU_MEMORY_SHARE of the memory that is free, and at most CPU_POOL_BYTES."""
CPU_POOL_BYTES = 2**30


class Core:
    """Model and pool, alive as long as the process; batchers come and go with the worker's incarnations."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.runner = ModelRunner(config)
        self.layout = self.runner.layout
        self.max_model_len = self.runner.max_model_len
        self.batch = _batch_config(config.batch)
        self.num_blocks = self._num_blocks()
        self.pool = HostPool(self.layout, self.num_blocks)
        self.runner.attach_pool(self.pool.tensor)

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
        if not count:
            wanted = cache.kv_cache_memory_bytes or min(CPU_POOL_BYTES, _free_memory() // CPU_MEMORY_SHARE)
            count = wanted // block_bytes
        if count < longest:
            raise UserError(
                f"the KV pool of {count} blocks holds {count * cache.block_size} tokens, fewer than max_model_len "
                f"{self.max_model_len}: give --num-blocks {longest} or more, or lower --max-model-len"
            )
        return count

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
        """Run one iteration and return its rows; an empty list when there is nothing to run."""
        now = time.monotonic()
        self._batcher.tick(now)
        plan = self._batcher.schedule(now)
        if plan is None:
            return []
        self._batcher.complete(self._core.runner.execute(plan), time.monotonic())
        rows = [effect for effect in self._batcher.outbox if isinstance(effect, Emit)]
        self._batcher.outbox.clear()
        return rows

    @property
    def batcher(self) -> Batcher:
        """For tests and benchmarks that look at the pool and the counters."""
        return self._batcher

    def close(self) -> None:
        """Free the pool."""
        self._core.close()


def _batch_config(batch: BatchConfig) -> BatchConfig:
    if batch.max_num_batched_tokens:
        return batch
    return msgspec.structs.replace(batch, max_num_batched_tokens=max(CPU_TOKEN_BUDGET, batch.max_num_seqs))


def _free_memory() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
