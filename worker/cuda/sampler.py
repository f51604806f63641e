"""Sampling on the device for rows that ask for more than a draw: bias, min_tokens, penalties and logprobs.

Plain rows are sampled inside the step. For these the logits are computed once more from the hidden states, edited, and
drawn from; what they depend on (token counts) stays on the device too, so nothing waits for an earlier step's result.
"""

from collections.abc import Callable

import numpy as np
import torch

from baton.kernels.cuda.ops import CudaOps
from baton.proto.messages import SamplingParams, TokenLogprobs
from baton.worker.cuda.step_buffer import DRAW_FIELDS
from baton.worker.philox import uniforms
from baton.worker.plan import SlotInit
from baton.worker.sampler import Need, SlotParams

_IN_PROMPT = 1 << 30
"""Bit of a token's count: repetition_penalty counts the prompt, the other penalties do not."""
_EXTRA = Need.BIAS | Need.MIN_TOKENS | Need.PENALTIES | Need.LOGPROBS


class DeviceLogprobs:
    """Log-probabilities of some rows on their way to the host."""

    def __init__(
        self,
        rows: list[int],
        wanted: list[int],
        chosen: torch.Tensor,
        ranks: torch.Tensor,
        top: tuple[torch.Tensor, torch.Tensor],
    ):
        self._rows, self._wanted = rows, wanted
        self._tensors = [_to_host(tensor) for tensor in (chosen, ranks, *top)]

    def read(self) -> dict[int, TokenLogprobs]:
        """By row of the sampled rows; only after the step's event."""
        chosen, ranks, values, ids = (tensor.tolist() for tensor in self._tensors)
        return {
            row: TokenLogprobs(
                logprob=chosen[index],
                rank=ranks[index],
                top=tuple(zip(ids[index][:count], values[index][:count], strict=True)),
            )
            for index, (row, count) in enumerate(zip(self._rows, self._wanted, strict=True))
        }


class CudaSampler(SlotParams):
    """Parameters of every slot, and token counts of those with penalties."""

    def __init__(self, vocab_size: int, num_slots: int, ops: CudaOps, device: torch.device) -> None:
        super().__init__(num_slots)
        self._vocab_size, self._num_slots, self._ops, self._device = vocab_size, num_slots, ops, device
        self._counts: torch.Tensor | None = None  # int32 [num_slots, vocab], made when the first stream wants it

    def take(self, init: SlotInit) -> None:
        """A stream takes a slot; what is enqueued later sees its state."""
        self.take_params(init.slot, init.params)
        if self._needs[init.slot] & Need.PENALTIES:
            self._count_known(init)

    def _count_known(self, init: SlotInit) -> None:
        if self._counts is None:
            self._counts = torch.zeros(self._num_slots, self._vocab_size, dtype=torch.int32, device=self._device)
        counts = self._counts[init.slot].zero_()
        tokens = self._upload(np.array(init.tokens, dtype=np.int64))
        output = tokens[init.prompt_len :]
        counts.scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))
        prompt = tokens[: init.prompt_len].unique()
        counts[prompt] += _IN_PROMPT

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

    def extra_rows(self, slots: np.ndarray) -> np.ndarray:
        """Which of the sampled rows need `resample`."""
        return np.flatnonzero(self._needs[slots] & _EXTRA)

    def resample(
        self,
        rows: np.ndarray,
        slots: np.ndarray,
        output_indices: np.ndarray,
        draw_columns: tuple[torch.Tensor, ...],
        logits_of: Callable[[torch.Tensor], torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, DeviceLogprobs | None]:
        """Tokens for the sampled rows `rows`, in place of those that the step drew.

        slots and output_indices are of all sampled rows; logits_of maps row indices on the device to logits. Returns
        row indices, slots and tokens, int64 [len(rows)] on the device, and the rows' log-probabilities.
        """
        where = self._upload(rows.astype(np.int64))
        slots = slots[rows]
        device_slots = self._upload(slots.astype(np.int64))
        logits = logits_of(where).float()
        needs = self._needs[slots]
        asked = np.flatnonzero(needs & Need.LOGPROBS)
        unmodified = logits[self._upload(asked)] if len(asked) else logits
        self._edit(logits, slots, needs, output_indices[rows])
        columns = [column[where] for column in draw_columns]
        tokens = self._ops.draw(logits, *columns)
        self._count(needs, device_slots, tokens)
        logprobs = self._logprobs(unmodified, asked, rows, slots, tokens) if len(asked) else None
        return where, device_slots, tokens, logprobs

    def _edit(self, logits: torch.Tensor, slots: np.ndarray, needs: np.ndarray, output_indices: np.ndarray) -> None:
        """Bias, min_tokens and penalties, in place."""
        for row in np.flatnonzero(needs & (Need.BIAS | Need.MIN_TOKENS)):
            params = self._of(slots[row])
            if params.logit_bias:
                biased = self._upload(np.array(list(params.logit_bias), dtype=np.int64))
                logits[row, biased] += self._upload(np.array(list(params.logit_bias.values()), dtype=np.float32))
            if output_indices[row] < params.min_tokens:
                logits[row, self._upload(np.array(params.stop_token_ids, dtype=np.int64))] = -torch.inf
        penalised = np.flatnonzero(needs & Need.PENALTIES)
        if len(penalised):
            self._penalise(logits, penalised, slots[penalised])

    def _penalise(self, logits: torch.Tensor, rows: np.ndarray, slots: np.ndarray) -> None:
        """Repetition (Keskar et al., 2019) counts the prompt too, the rest do not."""
        assert self._counts is not None
        where = self._upload(rows)
        counts = self._counts[self._upload(slots.astype(np.int64))]
        output = (counts & (_IN_PROMPT - 1)).float()
        given = [self._of(slot) for slot in slots]
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
            assert self._counts is not None
            where = self._upload(penalised)
            self._counts[slots[where], tokens[where]] += 1

    def _logprobs(
        self, logits: torch.Tensor, asked: np.ndarray, rows: np.ndarray, slots: np.ndarray, tokens: torch.Tensor
    ) -> DeviceLogprobs:
        """logits [len(asked), vocab], as the model gave them."""
        wanted = [self._of(slot).logprobs for slot in slots[asked]]
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        chosen = logits.gather(1, tokens[self._upload(asked)][:, None])
        ranks = (logits > chosen).sum(dim=-1) + 1
        values, ids = logits.topk(max(wanted), dim=-1)
        return DeviceLogprobs(
            rows[asked].tolist(), wanted, (chosen - normaliser)[:, 0], ranks, (values - normaliser, ids)
        )

    def _of(self, slot: int) -> SamplingParams:
        params = self._params[slot]
        assert params is not None
        return params

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        """Through pinned memory, which torch keeps until the copy is over: a pageable copy would wait for the GPU."""
        return torch.from_numpy(array).pin_memory().to(self._device, non_blocking=True)


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)
