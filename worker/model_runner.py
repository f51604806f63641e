"""Step plans in, tokens out, on a CPU: the place where the batcher's rows become tensors (cuda/runner.py on a GPU).

It runs in the worker's device thread. Per stream it keeps, by slot, the block table, the token sampled last and the
sampling state; everything else comes with the plan.
"""

import os
import time

import numpy as np
import torch

from baton.proto.config import WorkerConfig
from baton.proto.messages import TokenLogprobs
from baton.worker.batch import Batch
from baton.worker.constraints import Constraints, Masks
from baton.worker.grammar_compiler import GrammarCompiler
from baton.worker.loaded_model import LoadedModel
from baton.worker.plan import Row, SlotInit, StepPlan, StepResult
from baton.worker.pooler import PooledRows, Pooler, to_rows
from baton.worker.sampler import Sampler, prompt_logprobs

TARGETS = 64
"""Prompt positions whose logits are made at a time."""


class ModelRunner:
    """Owns the model and the per-slot state.

    Attributes: layout (KVLayout), max_model_len, vocab_size and grammars. Raises ValueError when the model can't be
    served. close() ends its threads.
    """

    def __init__(self, config: WorkerConfig) -> None:
        """config.batch has nothing left to the device."""
        self.threads = config.threads or len(os.sched_getaffinity(0))
        torch.set_num_threads(self.threads)
        loaded = LoadedModel(config, torch.device("cpu"))
        self._loaded, self.model, self.layout = loaded, loaded.model, loaded.layout
        self.vocab_size, self.max_model_len = loaded.vocab_size, loaded.max_model_len
        self.block_size = config.cache.block_size
        self._slots = _Slots(config.batch.max_num_seqs, -(-self.max_model_len // self.block_size))
        self._sampler = Sampler(self.vocab_size, config.batch.max_num_seqs, loaded.ops)
        self._pooler = Pooler(config.batch.max_num_seqs, loaded.hidden_size, torch.device("cpu"))
        self.grammars = GrammarCompiler(config.model, self.vocab_size)
        self._constraints = Constraints(self.grammars, self.vocab_size)

    def attach_pool(self, pool: torch.Tensor) -> None:
        """The KV pool: [num_blocks, *layout.groups[0].shape] of the layout's dtype. The caller keeps owning it."""
        self._loaded.check_pool(pool)
        self._pool = pool

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> StepResult:
        """Run one step. Blocks written by it are valid for everyone when this returns."""
        started = time.monotonic()
        for init in plan.new_slots:
            self._slots.take(init)
            self._sampler.take_slot(init.slot, init.params, init.prompt_len, init.tokens)
            self._constraints.take_slot(init)
            self._pooler.take_slot(init)
        building = self._constraints.begin(plan.rows)
        for source, target in plan.copies:
            self._pool[target] = self._pool[source]
        batch, pooled = self._slots.build_batch(plan.rows, self.block_size, self._pooler)
        hidden = self.model(batch, self._pool)
        masks = building.result() if building is not None else None
        tokens, logprobs = self._sample(plan.rows, hidden, masks)
        failed = masks.failed_rows(plan.rows) if masks is not None else {}
        told = self._prompt_logprobs(plan.rows, hidden)
        vectors = {} if pooled is None else self._vectors(pooled, hidden)
        return StepResult(plan.step, tokens, logprobs, started, time.monotonic(), failed, told, vectors)

    def close(self) -> None:
        """End its threads."""
        self._constraints.close()
        self.grammars.close()

    def _sample(
        self, rows: list[Row], hidden: torch.Tensor, masks: Masks | None
    ) -> tuple[list[list[int]], dict[int, tuple[TokenLogprobs, ...]]]:
        """hidden [num_sampling_rows + others, hidden_size] -> the columns of a StepResult."""
        results: list[list[int]] = [[] for _ in rows]
        sampling = [index for index, row in enumerate(rows) if row.samples]
        if not sampling:
            return results, {}
        slots = np.array([rows[index].slot for index in sampling])
        output_indices = np.array([rows[index].output_index for index in sampling])
        logits = self.model.logits(hidden[: len(sampling)]).float()
        tokens, logprobs = self._sampler.sample(logits, slots, output_indices, masks)
        self._slots.last_token[slots] = tokens
        for index, token in zip(sampling, tokens.tolist(), strict=True):
            results[index] = [token]
        return results, {sampling[row]: (value,) for row, value in logprobs.items()}

    def _vectors(self, pooled: PooledRows, hidden: torch.Tensor) -> dict[int, bytes]:
        """Of the rows whose vector is complete; the hidden states to pool are the last."""
        normed = self.model.normed(hidden[len(hidden) - len(pooled.tokens) :])
        return to_rows(pooled, self._pooler.pool(pooled, normed))

    def _prompt_logprobs(self, rows: list[Row], hidden: torch.Tensor) -> dict[int, bytes]:
        """Of the rows' targets, whose hidden states follow those of the sampled rows; a few at a time, because each
        takes logits of the whole vocabulary."""
        told = {}
        start = sum(row.samples for row in rows)
        for index, row in enumerate(rows):
            data = b""
            for first in range(0, len(row.targets), TARGETS):
                targets = torch.tensor(row.targets[first : first + TARGETS])
                logits = self.model.logits(hidden[start : start + len(targets)]).float()
                top = self._sampler.of(row.slot).prompt_logprobs
                data += prompt_logprobs(logits, targets, self._loaded.ops.logsumexp(logits), top).numpy().tobytes()
                start += len(targets)
            if data:
                told[index] = data
        return told


class _Slots:
    """Block tables and last tokens of the streams, as arrays indexed by slot."""

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self.block_tables = np.zeros((num_slots, max_blocks), dtype=np.int32)
        self.num_blocks = [0] * num_slots
        self.last_token = np.zeros(num_slots, dtype=np.int64)

    def take(self, init: SlotInit) -> None:
        self.num_blocks[init.slot] = 0
        self._append(init.slot, init.block_table)
        if init.tokens:
            self.last_token[init.slot] = init.tokens[-1]

    def _append(self, slot: int, blocks: list[int]) -> None:
        start = self.num_blocks[slot]
        self.block_tables[slot, start : start + len(blocks)] = blocks
        self.num_blocks[slot] = start + len(blocks)

    def build_batch(self, rows: list[Row], block_size: int, pooler: Pooler) -> tuple[Batch, PooledRows | None]:
        """The step's tensors; see Batch for shapes. logits_indices: of sampled rows, of targets, of what is pooled."""
        for row in rows:
            if row.new_blocks:
                self._append(row.slot, row.new_blocks)
        slots = np.array([row.slot for row in rows])
        starts = np.array([row.start for row in rows], dtype=np.int32)
        lengths = np.array([row.num_tokens for row in rows], dtype=np.int32)
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(lengths, out=query_start[1:])
        seq_lens = starts + lengths
        width = -(-int(seq_lens.max()) // block_size)
        tables = self.block_tables[slots, :width]
        sequence = np.repeat(np.arange(len(rows)), lengths)
        positions = np.arange(query_start[-1], dtype=np.int32) + (starts - query_start[:-1])[sequence]
        blocks = tables[sequence, positions // block_size].astype(np.int64)
        samples = np.array([row.samples for row in rows])
        targets = [start + np.arange(len(row.targets)) for row, start in zip(rows, query_start, strict=False)]
        pooled = pooler.rows(rows, query_start)
        wanted = [query_start[1:][samples] - 1, *targets, *([] if pooled is None else [pooled.tokens])]
        batch = Batch(
            token_ids=torch.from_numpy(self._token_ids(rows, slots, query_start)),
            positions=torch.from_numpy(positions),
            slot_mapping=torch.from_numpy(blocks * block_size + positions % block_size),
            query_start=torch.from_numpy(query_start),
            seq_lens=torch.from_numpy(seq_lens),
            block_tables=torch.from_numpy(tables),
            logits_indices=torch.from_numpy(np.concatenate(wanted).astype(np.int64)),
            max_query_len=int(lengths.max()),
            max_seq_len=int(seq_lens.max()),
        )
        return batch, pooled

    def _token_ids(self, rows: list[Row], slots: np.ndarray, query_start: np.ndarray) -> np.ndarray:
        flat: list[int] = []
        for row in rows:
            flat.extend(row.tokens or (0,))
        token_ids = np.array(flat, dtype=np.int64)
        from_device = np.array([row.from_device for row in rows])
        token_ids[query_start[:-1][from_device]] = self.last_token[slots[from_device]]
        return token_ids
