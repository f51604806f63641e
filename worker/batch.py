"""The tensors of one step: all that a model knows of what it computes."""

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Batch:
    """Tokens of several sequences, one after the other; a prefill chunk has many tokens, a decode row one.

    Sequence s owns tokens [query_start[s], query_start[s + 1]). They are the last of its seq_lens[s] tokens; the KV of
    those before is in the blocks of block_tables[s], the KV of these is written there by the step.
    """

    token_ids: torch.Tensor
    """int64 [num_tokens]."""
    positions: torch.Tensor
    """int32 [num_tokens], counted from the start of the sequence."""
    slot_mapping: torch.Tensor
    """int64 [num_tokens]: block id * block_size + offset in the block, where the token's KV goes."""
    query_start: torch.Tensor
    """int32 [num_seqs + 1], cumulative."""
    seq_lens: torch.Tensor
    """int32 [num_seqs], tokens in the cache after this step."""
    block_tables: torch.Tensor
    """int32 [num_seqs, width]; entries beyond a sequence's blocks are not read."""
    logits_indices: torch.Tensor | None
    """int64 [num_samples]: the tokens whose logits are wanted; None: of all, in their order."""
    max_query_len: int
    """Most tokens of one sequence; 1 for a pure decode step."""
    max_seq_len: int
    planned: object | None = None
    """query_start, seq_lens and block_tables in the device's own form; see Ops.paged_attention."""
