"""Step plans in, tokens out, on a GPU.

    launch(n): pack ─► one copy ─► tables ─► graph replay, or the same kernels one by one ─► tokens to pinned memory
    wait(n):   the step's event, usually long after launch(n + 1)

Nothing here waits for the device before `wait`. Sampled tokens stay there and feed the next step; all work is enqueued
on one stream, so that a step sees what the steps before it left.
"""

import logging
import time
from dataclasses import replace

import numpy as np
import torch

from baton.kernels.cuda import attention, work
from baton.kernels.cuda.copy import copy_blocks
from baton.kernels.cuda.fa3_attention import Sequences
from baton.kernels.cuda.ops import AttentionWork, CudaOps, DeviceLists
from baton.proto.config import WorkerConfig
from baton.proto.messages import TokenLogprobs
from baton.worker.batch import Batch
from baton.worker.constraints import Constraints, Masks
from baton.worker.cuda.graphs import Size, StepGraphs, decode_sizes, mixed_sizes
from baton.worker.cuda.rows import Rows
from baton.worker.cuda.sampler import CudaSampler, DeviceLogprobs, DevicePromptLogprobs, to_host
from baton.worker.cuda.slots import DeviceSlots
from baton.worker.cuda.step_buffer import StepBuffer, StepInputs, StepLayout
from baton.worker.grammar_compiler import GrammarCompiler
from baton.worker.loaded_model import LoadedModel
from baton.worker.plan import StepPlan, StepResult
from baton.worker.pooler import PooledRows, Pooler, to_rows
from baton.worker.weights.placement import SharedMemory

log = logging.getLogger(__name__)

_SPARE_TILES = 64
"""Tiles of a mixed graph beyond what one prompt needs: the last one of each further prompt may be half empty."""
_LOGITS_ROWS = 256
"""Rows whose logits exist at a time: more would cost memory (63 MiB for each 256 at a vocabulary of 128,000) and save
nothing, because from here on the product takes longer than reading its weight."""


class Pending:
    """A step on the device."""

    def __init__(
        self,
        plan: StepPlan,
        tokens: torch.Tensor,
        logprobs: list[DeviceLogprobs],
        prompt_logprobs: list[DevicePromptLogprobs],
        failed: dict[int, str],
        started_s: float,
        vectors: tuple[PooledRows, torch.Tensor] | None,
    ) -> None:
        self.plan = plan
        self.failed, self.started_s = failed, started_s
        self._vectors = vectors
        self._tokens, self._logprobs, self._prompt_logprobs = tokens, logprobs, prompt_logprobs
        self._gpu = torch.cuda.current_device()
        self._event = torch.cuda.Event()
        self._event.record()

    def wait(self) -> StepResult:
        """Block until the step has ended; other threads run meanwhile."""
        torch.cuda.set_device(self._gpu)  # a thread begins on the first GPU, and would open it for good
        self._event.synchronize()
        now = time.monotonic()
        sampled = iter(self._tokens.tolist())
        tokens = [[next(sampled)] if row.samples else [] for row in self.plan.rows]
        sampling = [index for index, row in enumerate(self.plan.rows) if row.samples]
        logprobs: dict[int, tuple[TokenLogprobs, ...]] = {
            sampling[row]: (value,) for part in self._logprobs for row, value in part.read().items()
        }
        told = {part.row: part.read() for part in self._prompt_logprobs}
        vectors = to_rows(*self._vectors) if self._vectors is not None else {}
        return StepResult(self.plan.step, tokens, logprobs, self.started_s, now, self.failed, told, vectors)


class CudaRunner:
    """Owns the model, the streams' state on the device and the graphs. All methods are called from one thread.

    Attributes: layout (KVLayout), max_model_len, vocab_size, block_size, grammars; max_tokens and max_seqs of a step.
    Raises ValueError when the model can't be served. close() ends its threads.
    """

    def __init__(self, config: WorkerConfig, shared: SharedMemory | None = None) -> None:
        """config.batch has nothing left to the device; `shared` is where the weights lie, if not here."""
        self.device = torch.device("cuda", config.gpu)
        torch.cuda.set_device(self.device)
        loaded = LoadedModel(config, self.device, shared)
        assert isinstance(loaded.ops, CudaOps)
        self._loaded, self._ops, self.model = loaded, loaded.ops, loaded.model
        self.layout, self.vocab_size, self.max_model_len = loaded.layout, loaded.vocab_size, loaded.max_model_len
        self.max_tokens, self.max_seqs = config.batch.max_num_batched_tokens, config.batch.max_num_seqs
        self.block_size = config.cache.block_size
        self._tile_tokens = attention.tile_tokens(loaded.num_heads, loaded.num_kv_heads)
        max_blocks = -(-self.max_model_len // self.block_size)
        self._slots = DeviceSlots(self.max_seqs, max_blocks, self.block_size, self.device)
        self._sampler = CudaSampler(self.vocab_size, self.max_seqs, loaded.ops, self.device)
        self._pooler = Pooler(self.max_seqs, loaded.hidden_size, self.device)
        self.grammars = GrammarCompiler(config.model, self.vocab_size)
        self._constraints = Constraints(self.grammars, self.vocab_size)
        tiles = self.max_tokens + _SPARE_TILES
        most = self._layout(self.max_tokens, self.max_seqs, self.max_seqs, tiles)
        largest = replace(most, sequences=self.max_seqs, prompt=self.max_tokens)
        table_words = 2 * (self._slots.tables.numel() + self.max_tokens)
        ring = config.batch.depth + 1
        self._buffer = StepBuffer(largest.words + table_words, ring, self.device)
        self._tokens = torch.zeros(self.max_seqs, dtype=torch.int64, device=self.device)
        self._host_tokens = [torch.zeros(self.max_seqs, dtype=torch.int64, pin_memory=True) for _ in range(ring)]
        self._graphs = self._new_graphs()

    def attach_pool(self, pool: torch.Tensor) -> None:
        """The KV pool: [num_blocks, *layout.groups[0].shape] of the layout's dtype. The caller keeps owning it."""
        self._loaded.check_pool(pool)
        self._pool = pool

    def detach_pool(self) -> None:
        """Let go of the pool."""
        del self._pool

    def _new_graphs(self) -> StepGraphs:
        mixed = mixed_sizes(self.max_tokens, self.max_seqs)
        return StepGraphs(self._blank, self._captured_step, decode_sizes(self.max_seqs), mixed)

    @torch.inference_mode()
    def measure_graphs(self) -> int:
        """Bytes that the graphs take beside the pool attached, measured on the largest."""
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(self.device)
        graphs = self._new_graphs()
        graphs.capture(graphs.largest())
        torch.cuda.empty_cache()  # what the same steps took outside of the graphs counts as activations
        return torch.cuda.memory_reserved(self.device) - before

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture the graphs over the pool attached last."""
        started = time.monotonic()
        self._graphs.capture()
        log.info("captured %d graphs in %.1f s", len(self._graphs.sizes), time.monotonic() - started)

    def execute(self, plan: StepPlan) -> StepResult:
        """Launch and wait."""
        return self.launch(plan).wait()

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Pending:
        """Enqueue one step."""
        started = time.monotonic()
        for init in plan.new_slots:
            self._sampler.take(init)
            self._constraints.take_slot(init)
            self._pooler.take_slot(init)
        building = self._constraints.begin(plan.rows)
        rows = Rows(plan.rows)
        lists = self._plan(rows)
        pooled = self._pooler.rows(plan.rows, rows.query_start)
        wanted = rows.prompt_indices if pooled is None else np.concatenate([rows.prompt_indices, pooled.tokens])
        size, layout = self._fit(rows, lists, len(wanted))
        inputs = self._upload(plan, rows, lists, layout, wanted)
        if plan.copies:
            self._copy_blocks(plan.copies)
        hidden = self._graphs.replay(size) if size else self._forward(inputs, layout)
        if size is None or size.mixed:
            self._sample(inputs, min(self._filled(len(rows.sampling)), layout.samples), hidden)
        masks = building.result() if building is not None else None  # built while the device computes hidden
        logprobs = self._resample(rows, inputs, hidden, masks)
        count = len(rows.sampling)
        told: list[DevicePromptLogprobs] = []
        if len(rows.prompt_indices):
            told = self._sampler.prompt_logprobs(plan.rows, hidden[count:], self.model.logits)
        vectors = None
        if pooled is not None:
            vectors = pooled, self._make_vectors(pooled, hidden[count + len(rows.prompt_indices) :])
        host = self._host_tokens[plan.step % len(self._host_tokens)][:count]
        host.copy_(self._tokens[:count], non_blocking=True)
        failed = masks.failed_rows(plan.rows) if masks is not None else {}
        return Pending(plan, host, logprobs, told, failed, started, vectors)

    def close(self) -> None:
        """End its threads."""
        self._constraints.close()
        self.grammars.close()

    def _copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        """Enqueue (from, to) copies within the pool, by the kernel that takes blocks out of peers' pools."""
        base, size = self._pool.data_ptr(), self._pool.stride(0) * self._pool.element_size()
        jobs = torch.tensor([[base + source * size, base + target * size] for source, target in copies])
        copy_blocks(jobs.pin_memory().to(self.device, non_blocking=True), size)

    def _plan(self, rows: Rows) -> tuple[work.Lists, ...]:
        """Attention's lists for each window of the model."""
        return work.plan(
            rows.query_start,
            rows.seq_lens,
            rows.slots,
            self._loaded.num_kv_heads,
            self._tile_tokens,
            self._loaded.windows,
            self._ops.splits_decode,
        )

    def _fit(self, rows: Rows, lists: tuple[work.Lists, ...], wanted: int) -> tuple[Size | None, StepLayout]:
        """The graph that this step runs in, if any, and how its inputs lie. The hidden states of so many tokens are
        wanted beside those of the sampled rows."""
        decode_rows = int((rows.lengths == 1).sum()) if self._ops.splits_decode else 0
        special = max(len(rows.sampling) + wanted, decode_rows)
        size = self._graphs.fit(rows.num_tokens, special, not rows.all_decode)
        tiles = len(lists[0].prefill)
        if size is not None:
            layout = self._layout_of(size)
            if tiles <= layout.prefill:
                return size, layout
        filled = min(self._filled(len(rows.sampling)), rows.num_tokens - wanted)  # no larger than the largest step
        samples = max(len(rows.sampling), filled)
        layout = replace(self._layout(rows.num_tokens, samples, decode_rows, tiles), prompt=wanted)
        if tiles and self._ops.takes_sequences:
            layout = replace(layout, sequences=len(rows.slots), longest=int(rows.lengths.max()))
        return None, layout

    def _filled(self, samples: int) -> int:
        """In how many rows so many are sampled: as in a decode graph. A number of its own may need kernels of cuBLAS
        that are not loaded yet, and loading waits for the device."""
        return next((size.tokens for size in self._graphs.decode if size.tokens >= samples), samples)

    def _layout(self, tokens: int, samples: int, decode_rows: int, tiles: int) -> StepLayout:
        kv_heads = self._loaded.num_kv_heads
        decode = work.max_decode_tiles(decode_rows, kv_heads) if decode_rows else 0
        return StepLayout(
            tokens, samples, decode, tiles, work.max_cut_rows(decode_rows, kv_heads), self._loaded.windows
        )

    def _layout_of(self, size: Size) -> StepLayout:
        if not self._ops.splits_decode:
            return self._layout(size.tokens, size.wanted, 0, size.tokens)  # each row may be a tile of its own
        if not size.mixed:
            return self._layout(size.tokens, size.wanted, size.tokens, 0)
        tiles = -(-size.tokens // self._tile_tokens) + _SPARE_TILES
        return self._layout(size.tokens, size.wanted, size.wanted, tiles)

    def _upload(
        self,
        plan: StepPlan,
        rows: Rows,
        lists: tuple[work.Lists, ...],
        layout: StepLayout,
        wanted: np.ndarray,
    ) -> StepInputs:
        """Fill the host's words and copy them over, with what changed in the block tables."""
        host = self._buffer.host()
        inputs = StepInputs(layout, host)
        arrays = {name: inputs[name].numpy() for name in layout.sections}
        slots, indices = rows.slots[rows.sampling], rows.output_indices[rows.sampling]
        count, tokens = len(slots), rows.num_tokens
        self._sampler.fill_draws(arrays["draws"][:count], slots, indices)
        arrays["draws"][count:] = 0
        arrays["sample_slots"][:count], arrays["sample_slots"][count:] = slots, self._slots.padding
        indices = np.concatenate([rows.query_start[1:][rows.sampling] - 1, wanted])
        arrays["logits_indices"][: len(indices)], arrays["logits_indices"][len(indices) :] = indices, 0
        arrays["token_ids"][:tokens], arrays["token_ids"][tokens:] = rows.token_ids(plan.rows), 0
        arrays["positions"][:tokens], arrays["positions"][tokens:] = rows.positions, 0
        arrays["token_slots"][:tokens], arrays["token_slots"][tokens:] = rows.slots[rows.sequence], -1
        for window, mine in zip(layout.windows, lists, strict=True):
            arrays[f"counts/{window}"][:] = len(mine.decode), len(mine.prefill)
            arrays[f"decode/{window}"][: len(mine.decode)] = mine.decode
            arrays[f"prefill/{window}"][: len(mine.prefill)] = mine.prefill
            arrays[f"parts/{window}"][: len(mine.parts)], arrays[f"parts/{window}"][len(mine.parts) :] = mine.parts, 0
        if layout.sequences:
            starts, seq_lens, slots = arrays["sequences"]
            starts[:], seq_lens[:-1], slots[:-1] = rows.query_start, rows.seq_lens, rows.slots
        updates = self._buffer.upload(host, layout, self._slots.updates(plan.new_slots, plan.rows))
        self._slots.apply(updates)
        return StepInputs(layout, self._buffer.device)

    def _blank(self, size: Size) -> None:
        """A step of nothing, all of it padding: it writes no block, which may be another worker's."""
        self._buffer.device.zero_()
        inputs = StepInputs(self._layout_of(size), self._buffer.device)
        inputs["token_slots"].fill_(-1)
        inputs["sample_slots"].fill_(self._slots.padding)

    def _captured_step(self, size: Size) -> torch.Tensor:
        """What the graph of this size captures."""
        layout = self._layout_of(size)
        inputs = StepInputs(layout, self._buffer.device)
        hidden = self._forward(inputs, layout)
        if not size.mixed:
            self._sample(inputs, layout.samples, hidden)
        return hidden

    def _forward(self, inputs: StepInputs, layout: StepLayout) -> torch.Tensor:
        """Hidden states of the rows to sample, and behind them of the prompts' tokens that are wanted beside:
        [layout.samples + layout.prompt, hidden]."""
        token_ids, slot_mapping = self._slots.prepare(inputs["token_ids"], inputs["positions"], inputs["token_slots"])
        batch = Batch(
            token_ids=token_ids,
            positions=inputs["positions"],
            slot_mapping=slot_mapping,
            query_start=inputs["positions"][:0],
            seq_lens=inputs["positions"][:0],
            block_tables=self._slots.tables[:0],
            logits_indices=None if layout.is_decode else inputs["logits_indices"],
            max_query_len=0,
            max_seq_len=0,
            planned=self._attention_work(inputs, layout),
        )
        return self.model(batch, self._pool)

    def _attention_work(self, inputs: StepInputs, layout: StepLayout) -> AttentionWork:
        lists = {
            window: DeviceLists(
                counts=inputs[f"counts/{window}"],
                decode=inputs[f"decode/{window}"] if layout.decode else None,
                parts=inputs[f"parts/{window}"] if layout.cut else None,
                prefill=inputs[f"prefill/{window}"] if layout.prefill else None,
            )
            for window in layout.windows
        }
        if not layout.sequences:
            return AttentionWork(self._slots.tables, lists)
        starts, seq_lens, slots = inputs["sequences"]
        tables = self._slots.tables.index_select(0, slots[:-1])
        return AttentionWork(self._slots.tables, lists, Sequences(starts, seq_lens[:-1], tables, layout.longest))

    def _sample(self, inputs: StepInputs, count: int, hidden: torch.Tensor) -> None:
        """Draw the first `count` rows' tokens and keep them as the last of their slots."""
        slots = inputs["sample_slots"]
        for start in range(0, count, _LOGITS_ROWS):
            part = slice(start, min(start + _LOGITS_ROWS, count))
            tokens = self._ops.draw(self.model.logits(hidden[part]), *(c[part] for c in inputs.draw_columns))
            self._slots.store_sampled(tokens, slots[part], self._tokens[part])

    def _make_vectors(self, pooled: PooledRows, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [>= len(pooled.tokens), hidden] -> the vectors that are complete, on their way to the host."""
        return to_host(self._pooler.pool(pooled, self.model.normed(hidden[: len(pooled.tokens)])))

    def _resample(
        self, rows: Rows, inputs: StepInputs, hidden: torch.Tensor, masks: Masks | None
    ) -> list[DeviceLogprobs]:
        slots, output_indices = rows.slots[rows.sampling], rows.output_indices[rows.sampling]
        found = []
        for extra in self._sampler.extra_rows(slots):
            indices, device_slots, tokens, logprobs = self._sampler.resample(
                extra,
                slots,
                output_indices,
                inputs.draw_columns,
                lambda chosen: self.model.logits(hidden[chosen]),
                masks,
            )
            self._tokens[indices] = tokens
            self._slots.last_tokens[device_slots] = tokens
            found += [logprobs] if logprobs else []
        return found
