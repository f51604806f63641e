"""The order of a KV block's bytes, and its description for peers."""

import math

import torch

from baton.proto.layout import Group, KVLayout

AXES = ("kv_heads", "layers", "kv", "tokens", "head_dim")
"""Inside a block, outermost first. Heads come first, so that a tensor-parallel slice of a block is one run."""


def kv_layout(
    num_kv_heads: int, num_layers: int, head_dim: int, block_size: int, dtype: torch.dtype, fingerprint: str
) -> KVLayout:
    """One group of full-attention blocks; the pool is one tensor [num_blocks, *shape]."""
    if block_size <= 0 or block_size % 16 != 0:
        raise ValueError(f"block size {block_size} is not a positive multiple of 16")
    shape = (num_kv_heads, num_layers, 2, block_size, head_dim)
    group = Group(
        kind="full",
        num_layers=num_layers,
        tokens_per_block=block_size,
        block_bytes=math.prod(shape) * dtype.itemsize,
        axes=AXES,
        shape=shape,
        dtype=str(dtype).removeprefix("torch."),
    )
    return KVLayout(fingerprint=fingerprint, groups=(group,))
