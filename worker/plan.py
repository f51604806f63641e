"""What stands between the batcher, which knows no tensors, and the model runner, which knows no requests.

Plain data and serialisable, so that the ranks of a group can follow a leader.
"""

import msgspec

from baton.proto.messages import SamplingParams, Sid, TokenLogprobs


class Plain(msgspec.Struct, array_like=True, gc=False):
    """Base of the structs here."""


class SlotInit(Plain):
    """A stream takes a slot: the runner's row of per-stream state (block table, token counts, parameters)."""

    slot: int
    sid: Sid
    attempt: int
    params: SamplingParams
    prompt_len: int
    """Tokens [0, prompt_len) are the prompt, the rest output: penalties tell them apart."""
    tokens: list[int]
    """All tokens known when the slot is taken: prompt, then output so far."""
    block_table: list[int]
    """Blocks owned when the slot is taken."""


class Row(Plain):
    """One stream's part in a step: tokens at positions [start, start + num_tokens)."""

    slot: int
    start: int
    """Position of the first token, equal to the tokens already in the KV cache."""
    num_tokens: int
    tokens: list[int]
    """The token ids, or empty when from_device."""
    from_device: bool
    """The single input token is the one sampled for this slot by the step before, still on the device."""
    new_blocks: list[int]
    """Appended to the slot's block table before the step."""
    samples: bool
    """Whether the last position's logits are sampled. False for a chunk that is not the prompt's last."""
    output_index: int
    """Index of the sampled token among the stream's output: the generator's counter."""
    targets: list[int] = []
    """Prompt tokens whose log-probabilities are wanted: those that follow the row's first len(targets) positions."""
    pools: int = 0
    """The hidden states, after the last norm, of so many last tokens of the row are added to the slot's sum."""
    mean_of: int = 0
    """The slot's sum, divided by this, is the stream's vector and comes back; 0: nothing comes back."""


class StepPlan(Plain):
    """One iteration of a worker."""

    step: int
    """Counts from 1; results come back in this order."""
    rows: list[Row]
    new_slots: list[SlotInit]
    """Taken before the step. A slot needs no message to be freed: it is simply taken again."""
    copies: list[tuple[int, int]] = []
    """(from, to): blocks to copy whole before the step computes anything; no block is in two pairs as a target."""

    @property
    def num_tokens(self) -> int:
        """Computed by the step, over all rows."""
        return sum(row.num_tokens for row in self.rows)


class StepResult(Plain):
    """What came back. Results map through the stored plan, never through slots."""

    step: int
    tokens: list[list[int]]
    """Per row of the plan: sampled token ids; empty when the row does not sample."""
    logprobs: dict[int, tuple[TokenLogprobs, ...]]
    """Row -> one entry per sampled token, for rows that asked."""
    started_s: float = 0.0
    """CLOCK_MONOTONIC when the runner began."""
    sampled_s: float = 0.0
    """CLOCK_MONOTONIC when the tokens were on the host."""
    failed: dict[int, str] = {}
    """Row -> why its stream can't go on; its token means nothing."""
    prompt_logprobs: dict[int, bytes] = {}
    """Row -> of its targets: PromptLogprobs.data."""
    vectors: dict[int, bytes] = {}
    """Row -> float32 [hidden_size], little-endian, for rows with mean_of."""
