"""The model in one process without any socket: what the offline LLM class stands on."""

import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from baton.proto.config import WorkerConfig
from baton.proto.hashing import hash_chain, pack_hashes
from baton.proto.messages import CancelStream, Peer, SamplingParams, Sid, StartPrefill
from baton.worker.backend import open_backend
from baton.worker.batcher import Batcher
from baton.worker.effects import Compiled, Emit, Release
from baton.worker.plan import StepResult


class Engine:
    """One unified worker in this process, driven by `step`."""

    def __init__(self, config: WorkerConfig) -> None:
        self._backend = open_backend(config)
        self._batcher = self._backend.new_batcher(Peer("offline", 1, "", ""))
        self.max_model_len = self._backend.max_model_len
        self._cmd_seq = 0
        self._in_flight: deque[Callable[[], StepResult]] = deque()

    def add(self, sid: Sid, params: SamplingParams, prompt_ids: Sequence[int], hashes: bytes | None = None) -> None:
        """Queue a stream. `hashes` is the prompt's packed chain, made here when None. Raises ValueError when the prompt
        leaves no room for output."""
        longest = self.max_model_len - min(params.max_tokens, 1)
        if not 0 < len(prompt_ids) <= longest:
            raise ValueError(f"a prompt must have 1 to {longest} tokens, this one has {len(prompt_ids)}")
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
        hashes = pack_hashes(hash_chain(tokens)) if hashes is None else hashes
        self._batcher.handle(command, (tokens.tobytes(), hashes), time.monotonic())
        if params.grammar:
            self._backend.grammars.hold(params.grammar)
            error = self._backend.grammars.matcher(params.grammar).exception()
            self._batcher.handle(Compiled(params.grammar, str(error or "")), (), time.monotonic())

    def abort(self, sid: Sid) -> None:
        """Drop a stream; no further row of it comes."""
        self._batcher.handle(CancelStream(sid, 1), (), time.monotonic())

    def step(self) -> list[Emit]:
        """Bring the oldest step to its end, others in flight, and return its rows; empty when nothing is to run."""
        now = time.monotonic()
        self._batcher.tick(now)
        while (plan := self._batcher.schedule(now)) is not None:
            self._in_flight.append(self._backend.launch(plan))
        if not self._in_flight:
            return []
        self._batcher.complete(self._in_flight.popleft()(), time.monotonic())
        effects, self._batcher.outbox[:] = list(self._batcher.outbox), []
        for effect in effects:
            if isinstance(effect, Release):
                self._backend.grammars.release(effect.grammar)
        return [effect for effect in effects if isinstance(effect, Emit)]

    @property
    def batcher(self) -> Batcher:
        """For tests and benchmarks that look at the pool and the counters."""
        return self._batcher

    def close(self) -> None:
        """End the steps in flight and free the pool."""
        while self._in_flight:
            self._in_flight.popleft()()
        self._backend.close()
