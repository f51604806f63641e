"""The fused operations on an NVIDIA GPU: cuBLAS for products of many rows, Triton for few and for everything else."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch.nn import functional

from baton.kernels.cuda import attention, elementwise, fa3_attention, sampling, skinny, tuning, work
from baton.kernels.cuda.attention import Problem
from baton.kernels.cuda.fa3_attention import Sequences
from baton.kernels.ops import Norm, PackedWeight

Prefill = Callable[[Problem, torch.Tensor, torch.Tensor], None]
"""attention.prefill, or a faster one with the same arguments."""


@dataclass(slots=True)
class DeviceLists:
    """work.Lists on the device. They may be longer than what counts, so that a graph fits any step of its size."""

    counts: torch.Tensor
    """int32 [2]: decode and prefill tiles that count."""
    decode: torch.Tensor | None
    """int32 [n, TILE_FIELDS], or None in a step without decode rows."""
    parts: torch.Tensor | None
    """int32 [n, PART_FIELDS] of the rows that were cut, if any."""
    prefill: torch.Tensor | None
    """int32 [n, TILE_FIELDS], or None in a step of decode rows only."""


@dataclass(slots=True)
class AttentionWork:
    """What all layers of a step attend to."""

    tables: torch.Tensor
    """int32 [rows, max_blocks]: every block table; the lists name rows of it."""
    lists: Mapping[int, DeviceLists]
    """By the window of the layers that use them."""
    sequences: Sequences | None = None
    """The same for kernels that take whole sequences; these compute the step where it is given."""


class CudaOps:
    """Implements ops.Ops. All launches go to the current stream; nothing waits for the device.

    takes_sequences: whether steps outside of graphs should come with AttentionWork.sequences.
    """

    splits_decode: ClassVar[bool] = True
    """Whether sequences with one query are planned as decode tiles, cut to fill the device, or like the others."""

    def __init__(
        self, skinny_products: bool = True, prefill: Prefill = attention.prefill, takes_sequences: bool = False
    ) -> None:
        """skinny_products: take our own kernels for few rows where they were measured to be faster than cuBLAS.

        prefill: computes the tiles of sequences with several query tokens.
        """
        self._tiles = tuning.product_tiles() if skinny_products else None
        self._prefill, self.takes_sequences = prefill, takes_sequences

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """See Ops: as it is."""
        return PackedWeight(weight, len(weight))

    def linear(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Ops."""
        if self._is_skinny(x):
            return self._skinny_product(x, packed, bias, norm, residual, gated=False)
        x = x if norm is None else self.rms_norm(x, norm)
        if residual is None:
            return functional.linear(x, packed.data, bias)
        if bias is not None:
            residual += bias
        return residual.addmm_(x, packed.data.T)

    def gated_linear(
        self, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, norm: Norm | None = None
    ) -> torch.Tensor:
        """See Ops."""
        if self._is_skinny(x):
            return self._skinny_product(x, packed, bias, norm, None, gated=True)
        return self.silu_and_mul(self.linear(x, packed, bias, norm))

    def _is_skinny(self, x: torch.Tensor) -> bool:
        """Whether skinny.py takes a product of x. With float32 the tensor cores would round, so only single rows."""
        return self._tiles is not None and len(x) <= (self._tiles.most_rows if x.element_size() == 2 else 1)

    def _skinny_product(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        norm: Norm | None,
        residual: torch.Tensor | None,
        gated: bool,
    ) -> torch.Tensor:
        assert self._tiles is not None
        if len(x) == 1:
            tile = self._tiles.gated if gated else self._tiles.plain
            return skinny.one_row(x, packed.data, bias, norm, residual, gated, tile)
        x = x if norm is None else self.rms_norm(x, norm)
        return skinny.few_rows(x, packed.data, bias, residual, gated, self._tiles.several(len(x)))

    def embedding(self, token_ids: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        """See Ops."""
        return functional.embedding(token_ids, packed.data)

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See Ops."""
        return elementwise.rms_norm(x, norm)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        return elementwise.silu_and_mul(gate_up)

    def rope_and_cache(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None,
    ) -> torch.Tensor:
        """See Ops."""
        return elementwise.rope_and_cache(qkv, num_heads, cos_sin, positions, slot_mapping, pool, layer, qk_norm)

    def paged_attention(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        scale: float,
        planned: object | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        """See Ops. `planned` is an AttentionWork; without one it is made here, which waits for the device."""
        if planned is None:
            planned = self.plan(query, pool, query_start, seq_lens, block_tables, window)
        assert isinstance(planned, AttentionWork)
        if planned.sequences is not None:
            return fa3_attention.attend(query, pool, layer, planned.sequences, scale, window)
        n, heads, dim = query.shape
        out = torch.empty(n, heads * dim, dtype=query.dtype, device=query.device)
        problem = Problem(query, pool, layer, planned.tables, out, scale, window, soft_cap)
        lists = planned.lists[window]
        if lists.prefill is not None:
            self._prefill(problem, lists.prefill, lists.counts[1:])
        if lists.decode is not None:
            attention.decode(problem, lists.decode, lists.counts, lists.parts)
        return out

    def plan(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        window: int = 0,
    ) -> AttentionWork:
        """The work lists of one step, from the tensors that every Ops takes."""
        heads, kv_heads = query.shape[1], pool.shape[1]
        (lists,) = work.plan(
            query_start.cpu().numpy(),
            seq_lens.cpu().numpy(),
            np.arange(len(seq_lens)),
            kv_heads,
            attention.tile_tokens(heads, kv_heads),
            (window,),
            self.splits_decode,
        )
        counts = np.array([len(lists.decode), len(lists.prefill)], dtype=np.int32)
        counted, decode, parts, prefill = (
            torch.from_numpy(array).to(query.device) if len(array) else None
            for array in (counts, lists.decode, lists.parts, lists.prefill)
        )
        assert counted is not None
        return AttentionWork(block_tables, {window: DeviceLists(counted, decode, parts, prefill)})

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """logits [n, vocab] -> float32 [n]."""
        return sampling.logsumexp(logits)

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> torch.Tensor:
        """See Ops. Rows with temperature 0 get their argmax, and the parameters may be strided."""
        return sampling.draw(logits, temperatures, top_k, top_p, min_p, uniforms)
