"""The contract of the fused operations a model is built from; one class per device implements it.

reference.TorchOps says what each computes, in plain torch; cpu.CpuOps is the same in C.
"""

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight [rows, features] in the order that the device's product wants; only its Ops can read `data`."""

    data: torch.Tensor
    rows: int


class Norm(NamedTuple):
    """An RMSNorm: x / sqrt(mean(x², -1) + eps) * weight, in float32. Zhang & Sennrich, 2019."""

    weight: torch.Tensor
    """[features]."""
    eps: float


class Ops(Protocol):
    """What the layers call. No operation keeps state; all of a model's are called from one thread."""

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """weight [rows, features] of a linear layer or an embedding, which may be dropped afterwards."""
        ...

    def linear(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """norm(x [n, features]) W^T + bias [rows] + residual [n, rows] -> [n, rows]; `residual` may be overwritten."""
        ...

    def gated_linear(
        self, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, norm: Norm | None = None
    ) -> torch.Tensor:
        """silu(gate) * up of norm(x [n, features]) W^T + bias, whose first half of rows is gate -> [n, rows / 2]."""
        ...

    def embedding(self, token_ids: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        """token_ids int64 [n] -> the weight's rows [n, features]."""
        ...

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x [n, features] -> [n, features]."""
        ...

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """silu(gate) * up. gate_up [n, 2 * intermediate], gate first -> [n, intermediate]."""
        ...

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
        """Rotate queries and keys, write keys and values into their blocks; returns the queries.

        qkv [n, (num_heads + 2 * num_kv_heads) * head_dim], may be overwritten; cos_sin float32 [max_positions,
        rotary_dim], cosines first; positions int32 [n]; slot_mapping int64 [n]; pool [num_blocks, num_kv_heads,
        num_layers, 2, block_size, head_dim]. The first rotary_dim elements of a head turn, half against half (the
        order of Hugging Face checkpoints). qk_norm: RMSNorm of every query and key head before that, as (query weight
        [head_dim], key weight [head_dim], eps). Returns [n, num_heads, head_dim], maybe a view of qkv.
        """
        ...

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
        """Causal softmax(scale * q k^T) v of the last tokens of each sequence over all its cached tokens.

        query [n, num_heads, head_dim], last axis dense; query_start int32 [num_seqs + 1]; seq_lens int32 [num_seqs];
        block_tables int32 [num_seqs, width]. Sequence s has queries [query_start[s], query_start[s + 1]); the last of
        them is at position seq_lens[s] - 1. Query head h reads KV head h // (num_heads / num_kv_heads).
        `planned`: query_start, seq_lens and block_tables in the form that this Ops prefers, made once for all layers;
        those three may be empty then. A token sees `window` tokens, itself included; 0: all before it (Beltagy et al.,
        2020). soft_cap: scores s become soft_cap * tanh(s / soft_cap); 0: they stay. Returns [n, num_heads * head_dim].
        """
        ...

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> torch.Tensor:
        """A token per row, from softmax(logits / temperature) restricted by min_p, top_k, then top_p.

        logits float32 [n, vocab]; temperatures float32, top_k int64 (0 is off), top_p float64 (1 is off), min_p float32
        (0 is off), uniforms float64 in [0, 1), all [n]. Tokens tied with the last one kept are kept too. The token is
        the first in vocabulary order whose cumulative probability exceeds the uniform; the sum runs in float64 within
        the row, so that a row's token does not depend on the rows beside it. Returns int64 [n].
        """
        ...

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """log(sum(exp(row))) of each row of logits float32 [n, vocab] -> [n]; a row's bits are those it has alone."""
        ...
