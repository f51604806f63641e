"""Paged attention by FlashAttention-3 (Shah et al., 2024), the optional extra `fa3`, for whole sequences.

The package is a third party's build of the authors' source for pages of 16 tokens and more and CUDA 13; it has no soft
cap. What it must be given of a step (the number of splits, the longest query) is fixed on the host, so it runs in steps
outside of graphs only.
"""

import importlib.util
from dataclasses import dataclass

import torch

MODULE = "flash_attn_interface"


@dataclass(frozen=True, slots=True)
class Sequences:
    """A step's sequences on the device; see Ops.paged_attention."""

    query_start: torch.Tensor
    """int32 [num_seqs + 1]."""
    seq_lens: torch.Tensor
    """int32 [num_seqs]."""
    tables: torch.Tensor
    """int32 [num_seqs, max_blocks]."""
    max_query_len: int


def installed() -> bool:
    """Whether the extra is there; does not import it."""
    return importlib.util.find_spec(MODULE) is not None


def attend(
    query: torch.Tensor, pool: torch.Tensor, layer: int, sequences: Sequences, scale: float, window: int
) -> torch.Tensor:
    """All query rows of a step; see Ops.paged_attention."""
    from flash_attn_interface import flash_attn_with_kvcache

    out: torch.Tensor = flash_attn_with_kvcache(
        query,
        pool[:, :, layer, 0].transpose(1, 2),
        pool[:, :, layer, 1].transpose(1, 2),
        cache_seqlens=sequences.seq_lens,
        page_table=sequences.tables,
        cu_seqlens_q=sequences.query_start,
        max_seqlen_q=sequences.max_query_len,
        softmax_scale=scale,
        causal=True,
        window_size=(window - 1, 0) if window else (-1, -1),
    )
    return out.flatten(1)
