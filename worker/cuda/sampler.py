"""Sampling on the device for rows that ask for more than a draw: bias, min_tokens, penalties, masks and logprobs.

Plain rows are sampled inside the step. For these the logits are computed once more from the hidden states, edited, and
drawn from; what they depend on (token counts) stays on the device too, so nothing waits for an earlier step's result.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch

from baton.kernels.cuda.ops import CudaOps
from baton.proto.messages import SamplingParams, TokenLogprobs
from baton.worker.constraints import Masks
from baton.worker.cuda.step_buffer import DRAW_FIELDS
from baton.worker.philox import uniforms
from baton.worker.plan import Row, SlotInit
from baton.worker.sampler import Need, SlotParams, picked_tokens, prompt_logprobs, reported

ROWS = 128
"""Rows that get more than a draw at a time: their logits are edited in float32 copies of the whole vocabulary."""
_IN_PROMPT = 1 << 14
"""Bit of a token's count: repetition_penalty counts the prompt, the other penalties do not."""
_MOST = _IN_PROMPT - 1
"""Where a count stops."""
_EXTRA = Need.BIAS | Need.MIN_TOKENS | Need.PENALTIES | Need.LOGPROBS | Need.MASK


class DeviceLogprobs:
    """Log-probabilities of some rows on their way to the host."""

    def __init__(
        self,
        rows: list[int],
        given: list[SamplingParams],
        chosen: torch.Tensor,
        ranks: torch.Tensor,
        top: tuple[torch.Tensor, torch.Tensor],
        picked: torch.Tensor,
    ):
        self._rows, self._given = rows, given
        self._tensors = [to_host(tensor) for tensor in (chosen, ranks, *top, picked)]

    def read(self) -> dict[int, TokenLogprobs]:
        """By row of the sampled rows; only after the step's event."""
        chosen, ranks, values, ids, picked = (tensor.tolist() for tensor in self._tensors)
        return {
            row: TokenLogprobs(
                logprob=chosen[index],
                rank=ranks[index],
                top=reported(params, ids[index], values[index], picked[index]),
            )
            for index, (row, params) in enumerate(zip(self._rows, self._given, strict=True))
        }


class DevicePromptLogprobs:
    """PromptLogprobs.data of one row of the step on its way to the host."""

    def __init__(self, row: int, parts: list[torch.Tensor]) -> None:
        self.row = row
        self._parts = [to_host(part) for part in parts]

    def read(self) -> bytes:
        """Only after the step's event."""
        return b"".join(part.numpy().tobytes() for part in self._parts)


class CudaSampler(SlotParams):
    """Parameters of every slot, and token counts of those with penalties: int16 [num_slots, vocab]."""

    def __init__(self, vocab_size: int, num_slots: int, ops: CudaOps, device: torch.device) -> None:
        super().__init__(num_slots)
        self._ops, self._device = ops, device
        # Made before the KV pool takes the rest of the memory.
        self._counts = torch.zeros(num_slots, vocab_size, dtype=torch.int16, device=device)

    def take(self, init: SlotInit) -> None:
        """A stream takes a slot; what is enqueued later sees its state."""
        self.take_params(init.slot, init.params)
        if self._needs[init.slot] & Need.PENALTIES:
            self._count_known(init)

    def _count_known(self, init: SlotInit) -> None:
        """On the host, where the tokens are: finding the different ones of a tensor would wait for the device."""
        tokens = np.array(init.tokens, dtype=np.int64)
        counts = np.bincount(tokens[init.prompt_len :], minlength=self._counts.shape[1]).clip(max=_MOST)
        counts[np.unique(tokens[: init.prompt_len])] += _IN_PROMPT
        self._counts[init.slot].copy_(self._upload(counts.astype(np.int16)))

    def fill_draws(self, draws: np.ndarray, slots: np.ndarray, output_indices: np.ndarray) -> None:
        """draws int32 [n, DRAW_FIELDS] on the host, for the sampled rows `slots` [n]."""
        drawn = self._needs[slots] & Need.DRAW != 0
        float32, float64 = draws.view(np.float32), draws.view(np.float64)
        float32[:, 4] = np.where(drawn, self._temperature[slots], 0)
        if not drawn.any():
            return
        assert draws.shape[1] == DRAW_FIELDS
        float64[:, 0] = uniforms(self._seeds[slots], self._sample_indices[slots], output_indices)
        float64[:, 1] = self._top_p[slots]
        draws[:, 5] = self._top_k[slots]
        float32[:, 6] = self._min_p[slots]

    def extra_rows(self, slots: np.ndarray) -> list[np.ndarray]:
        """Which of the sampled rows need `resample`, in parts for one call each."""
        extra = np.flatnonzero(self._needs[slots] & _EXTRA)
        return [extra[start : start + ROWS] for start in range(0, len(extra), ROWS)]

    def resample(
        self,
        rows: np.ndarray,
        slots: np.ndarray,
        output_indices: np.ndarray,
        draw_columns: tuple[torch.Tensor, ...],
        logits_of: Callable[[torch.Tensor], torch.Tensor],
        masks: Masks | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DeviceLogprobs | None]:
        """Tokens for the sampled rows `rows`, in place of those that the step drew.

        slots and output_indices are of all sampled rows; logits_of maps row indices on the device to logits; masks are
        of all sampled rows with Need.MASK. Returns row indices, slots and tokens, int64 [len(rows)] on the device, and
        the rows' log-probabilities.
        """
        where = self._upload(rows.astype(np.int64))
        slots = slots[rows]
        device_slots = self._upload(slots.astype(np.int64))
        logits = logits_of(where).float()
        needs = self._needs[slots]
        asked = np.flatnonzero(needs & Need.LOGPROBS)
        unmodified = logits[self._upload(asked)] if len(asked) else logits
        self._edit(logits, slots, needs, output_indices[rows])
        if masks is not None:
            here = np.flatnonzero(np.isin(masks.rows, rows))
            if len(here):
                self._mask(logits, np.searchsorted(rows, masks.rows[here]), masks.words[here])
        columns = [column[where] for column in draw_columns]
        tokens = self._ops.draw(logits, *columns)
        self._count(needs, device_slots, tokens)
        logprobs = self._logprobs(unmodified, asked, rows, slots, tokens) if len(asked) else None
        return where, device_slots, tokens, logprobs

    def _edit(self, logits: torch.Tensor, slots: np.ndarray, needs: np.ndarray, output_indices: np.ndarray) -> None:
        """Bias, min_tokens and penalties, in place."""
        for row in np.flatnonzero(needs & (Need.BIAS | Need.MIN_TOKENS)):
            params = self.of(slots[row])
            if params.logit_bias:
                biased = self._upload(np.array(list(params.logit_bias), dtype=np.int64))
                logits[row, biased] += self._upload(np.array(list(params.logit_bias.values()), dtype=np.float32))
            if needs[row] & Need.MIN_TOKENS and output_indices[row] < params.min_tokens:
                logits[row, self._upload(np.array(params.stop_token_ids, dtype=np.int64))] = -torch.inf
        penalised = np.flatnonzero(needs & Need.PENALTIES)
        if len(penalised):
            self._penalise(logits, penalised, slots[penalised])

    def _mask(self, logits: torch.Tensor, rows: np.ndarray, words: np.ndarray) -> None:
        """Ban what `words` int32 [n, ceil(vocab / 32)] do not allow in rows [n] of logits [:, vocab], in place."""
        bits = torch.arange(8, dtype=torch.uint8, device=self._device)
        packed = self._upload(words.view(np.uint8))  # little-endian: byte by byte in the order of the tokens
        allowed = (packed[:, :, None] >> bits & 1).view(len(rows), -1)[:, : logits.shape[1]]
        where = self._upload(rows)
        logits[where] = logits[where].masked_fill(allowed == 0, -torch.inf)

    def _penalise(self, logits: torch.Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        """Repetition (Keskar et al., 2019) counts the prompt too, the rest do not."""
        where = self._upload(rows)
        counts = self._counts[self._upload(slots.astype(np.int64))]
        output = (counts & _MOST).float()
        given = [self.of(slot) for slot in slots]
        repetition, frequency, presence = self._upload(
            np.array([[p.repetition_penalty, p.frequency_penalty, p.presence_penalty] for p in given], dtype=np.float32)
        ).T[:, :, None]
        values = logits[where]
        repeated = torch.where(values > 0, values / repetition, values * repetition)
        values = torch.where(counts > 0, repeated, values)
        values -= frequency * output
        values -= presence * (output > 0)
        logits[where] = values

    def _count(self, needs: np.ndarray, slots: torch.Tensor, tokens: torch.Tensor) -> None:
        penalised = np.flatnonzero(needs & Need.PENALTIES)
        if len(penalised):
            where = self._upload(penalised)
            at = slots[where], tokens[where]
            before = self._counts[at]
            self._counts[at] = before + (before & _MOST < _MOST).to(torch.int16)

    def _logprobs(
        self, logits: torch.Tensor, asked: np.ndarray, rows: np.ndarray, slots: np.ndarray, tokens: torch.Tensor
    ) -> DeviceLogprobs:
        """logits [len(asked), vocab], as the model gave them."""
        given = [self.of(slot) for slot in slots[asked]]
        normaliser = self._ops.logsumexp(logits)[:, None]
        chosen = logits.gather(1, tokens[self._upload(asked)][:, None])
        ranks = (logits > chosen).sum(dim=-1) + 1
        values, ids = logits.topk(max(params.logprobs for params in given), dim=-1)
        picked = logits.gather(1, self._upload(picked_tokens(given)))
        return DeviceLogprobs(
            rows[asked].tolist(),
            given,
            (chosen - normaliser)[:, 0],
            ranks,
            (values - normaliser, ids),
            picked - normaliser,
        )

    def prompt_logprobs(
        self,
        rows: Sequence[Row],
        hidden: torch.Tensor,
        logits_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> list[DevicePromptLogprobs]:
        """Of the rows' targets; hidden [targets of all rows, hidden_size]; logits_of maps hidden states to logits."""
        told, start = [], 0
        for index, row in enumerate(rows):
            parts = []
            for first in range(0, len(row.targets), ROWS):
                targets = np.array(row.targets[first : first + ROWS], dtype=np.int64)
                logits = logits_of(hidden[start : start + len(targets)]).float()
                top = self.of(row.slot).prompt_logprobs
                parts.append(prompt_logprobs(logits, self._upload(targets), self._ops.logsumexp(logits), top))
                start += len(targets)
            if parts:
                told.append(DevicePromptLogprobs(index, parts))
        return told

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        """Through pinned memory, which torch keeps until the copy is over: a pageable copy would wait for the GPU."""
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Pinned; holds the values once the work enqueued so far is done."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
