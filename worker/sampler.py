"""Logits to tokens, for all rows of a step at once.

Per stream the sampler keeps its parameters, as columns of numpy arrays indexed by slot, and token counts if it has
penalties. A step looks at the union of its rows' flags, so that what nobody asked for costs nothing: a batch of plain
greedy rows is one argmax.

Order of operations, as in vLLM: logit_bias and min_tokens, penalties, temperature, min_p, top_k, top_p, draw.
"""

from enum import IntFlag

import numpy as np
import torch

from baton.proto.messages import SamplingParams, TokenLogprobs
from baton.worker.philox import uniforms

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy."""
_NUCLEUS_CANDIDATES = 1024
"""top_p looks at so many best tokens first, and sorts the vocabulary only if they don't hold the mass."""


class Need(IntFlag):
    """What a row asks for beyond argmax."""

    DRAW = 1
    BIAS = 2
    MIN_TOKENS = 4
    PENALTIES = 8
    MIN_P = 16
    TOP_K = 32
    TOP_P = 64
    LOGPROBS = 128


_EDITS_LOGITS = Need.BIAS | Need.MIN_TOKENS | Need.PENALTIES


class _TokenCounts:
    """What the penalties of one stream look at: which tokens its prompt has, how often its output has each."""

    def __init__(self, tokens: list[int], prompt_len: int, vocab_size: int) -> None:
        ids = torch.tensor(tokens, dtype=torch.int64)
        self.in_prompt = torch.zeros(vocab_size, dtype=torch.bool)
        self.in_prompt[ids[:prompt_len]] = True
        self.output = torch.bincount(ids[prompt_len:], minlength=vocab_size).to(torch.float32)


class Sampler:
    """Draws tokens; owns the sampling state of every slot. Not thread-safe."""

    def __init__(self, vocab_size: int, num_slots: int) -> None:
        self.vocab_size = vocab_size
        self._needs = np.zeros(num_slots, dtype=np.int32)
        self._temperature = np.ones(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float64)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seeds = np.zeros(num_slots, dtype=np.uint64)
        self._sample_indices = np.zeros(num_slots, dtype=np.uint32)
        self._params: list[SamplingParams | None] = [None] * num_slots
        self._counts: dict[int, _TokenCounts] = {}

    def take_slot(self, slot: int, params: SamplingParams, prompt_len: int, tokens: list[int]) -> None:
        """A stream with these known tokens (prompt, then output so far) takes a slot, whoever had it before."""
        needs = self._find_needs(params)
        self._needs[slot] = needs
        self._params[slot] = params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = np.uint64(params.seed & 0xFFFFFFFFFFFFFFFF)
        self._sample_indices[slot] = params.sample_index
        self._counts.pop(slot, None)
        if needs & Need.PENALTIES:
            self._counts[slot] = _TokenCounts(tokens, prompt_len, self.vocab_size)

    def sample(
        self, logits: torch.Tensor, slots: np.ndarray, output_indices: np.ndarray
    ) -> tuple[np.ndarray, dict[int, TokenLogprobs]]:
        """One token per row.

        logits float32 [n, vocab_size], may be overwritten; slots int [n]; output_indices int [n], the position of the
        token among its stream's output. Returns int64 [n] and the log-probabilities of the rows that asked for them.
        """
        needs = self._needs[slots]
        union = int(np.bitwise_or.reduce(needs)) if len(needs) else 0
        asked = np.flatnonzero(needs & Need.LOGPROBS) if union & Need.LOGPROBS else None
        unmodified = logits
        if asked is not None:
            unmodified = logits[torch.from_numpy(asked)]  # a copy: the edits below are in place
        if union & _EDITS_LOGITS:
            self._edit(logits, slots, needs, output_indices)
        if union & Need.DRAW:
            tokens = self._choose(logits, slots, needs, output_indices)
        else:
            tokens = logits.argmax(dim=-1).numpy()
        if union & Need.PENALTIES:
            self._count(slots, tokens)
        return tokens, {} if asked is None else self._logprobs(unmodified, asked, slots, tokens)

    def _find_needs(self, params: SamplingParams) -> Need:
        needs = Need(0)
        if params.logit_bias:
            needs |= Need.BIAS
        if params.min_tokens > 0 and params.stop_token_ids:
            needs |= Need.MIN_TOKENS
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            needs |= Need.PENALTIES
        if params.logprobs >= 0:
            needs |= Need.LOGPROBS
        if params.temperature < GREEDY_BELOW:
            return needs
        needs |= Need.DRAW
        if params.min_p > 0:
            needs |= Need.MIN_P
        if 0 < params.top_k < self.vocab_size:
            needs |= Need.TOP_K
        if params.top_p < 1:
            needs |= Need.TOP_P
        return needs

    def _edit(self, logits: torch.Tensor, slots: np.ndarray, needs: np.ndarray, output_indices: np.ndarray) -> None:
        """Bias, min_tokens and penalties, in place."""
        for row in np.flatnonzero(needs & (Need.BIAS | Need.MIN_TOKENS)):
            params = self._params[slots[row]]
            assert params is not None
            if params.logit_bias:
                biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
                logits[row, biased] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            if output_indices[row] < params.min_tokens:
                logits[row, list(params.stop_token_ids)] = -torch.inf
        rows = np.flatnonzero(needs & Need.PENALTIES)
        if len(rows):
            index = torch.from_numpy(rows)
            logits[index] = self._penalised(logits[index], slots[rows])

    def _penalised(self, logits: torch.Tensor, slots: np.ndarray) -> torch.Tensor:
        """logits [m, vocab]. Repetition (Keskar et al., 2019) counts the prompt too, the others only the output."""
        params = [self._params[slot] for slot in slots]
        counts = [self._counts[slot] for slot in slots]

        def column(name: str) -> torch.Tensor:
            return torch.tensor([getattr(p, name) for p in params], dtype=torch.float32)[:, None]

        output = torch.stack([c.output for c in counts])
        in_output = output > 0
        seen = in_output | torch.stack([c.in_prompt for c in counts])
        repetition = column("repetition_penalty")
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
        return logits - column("frequency_penalty") * output - column("presence_penalty") * in_output

    def _choose(
        self, logits: torch.Tensor, slots: np.ndarray, needs: np.ndarray, output_indices: np.ndarray
    ) -> np.ndarray:
        """Greedy rows by argmax, the others by a draw."""
        drawn = np.flatnonzero(needs & Need.DRAW)
        if len(drawn) == len(slots):
            return self._draw(logits, slots, needs, output_indices)
        tokens = np.empty(len(slots), dtype=np.int64)
        greedy = np.flatnonzero(needs & Need.DRAW == 0)
        tokens[greedy] = logits[torch.from_numpy(greedy)].argmax(dim=-1).numpy()
        tokens[drawn] = self._draw(logits[torch.from_numpy(drawn)], slots[drawn], needs[drawn], output_indices[drawn])
        return tokens

    def _draw(
        self, logits: torch.Tensor, slots: np.ndarray, needs: np.ndarray, output_indices: np.ndarray
    ) -> np.ndarray:
        """Inverse of the filtered distribution's cumulative sum in vocabulary order, at one uniform per row.

        The sum runs in float64 within the row, so that a row's token does not depend on the rows beside it.
        """
        scaled = logits / torch.from_numpy(self._temperature[slots])[:, None]
        scaled -= scaled.amax(dim=-1, keepdim=True)
        if np.any(needs & (Need.MIN_P | Need.TOP_K | Need.TOP_P)):
            scaled.masked_fill_(scaled < self._thresholds(scaled, slots, needs)[:, None], -torch.inf)
        cumulative = scaled.exp_().cumsum(dim=-1, dtype=torch.float64)
        draws = torch.from_numpy(uniforms(self._seeds[slots], self._sample_indices[slots], output_indices))
        targets = draws * cumulative[:, -1]
        tokens = torch.searchsorted(cumulative, targets[:, None], right=True)[:, 0]
        return tokens.clamp_(max=self.vocab_size - 1).numpy()

    def _thresholds(self, scaled: torch.Tensor, slots: np.ndarray, needs: np.ndarray) -> torch.Tensor:
        """Smallest scaled logit that each row keeps: [m]. The best logit of a row of `scaled` is 0."""
        thresholds = torch.full((len(slots),), -torch.inf)
        by_min_p = np.flatnonzero(needs & Need.MIN_P)
        thresholds[by_min_p] = torch.from_numpy(np.log(self._min_p[slots[by_min_p]]))
        for row in np.flatnonzero(needs & (Need.TOP_K | Need.TOP_P)):
            slot = slots[row]
            top_k = int(self._top_k[slot]) if needs[row] & Need.TOP_K else 0
            top_p = float(self._top_p[slot]) if needs[row] & Need.TOP_P else 1.0
            own = _threshold(scaled[row], float(thresholds[row]), top_k, top_p)
            thresholds[row] = max(float(thresholds[row]), own)
        return thresholds

    def _count(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            if slot in self._counts:
                self._counts[slot].output[token] += 1

    def _logprobs(
        self, logits: torch.Tensor, rows: np.ndarray, slots: np.ndarray, tokens: np.ndarray
    ) -> dict[int, TokenLogprobs]:
        """logits [len(rows), vocab], as the model gave them."""
        wanted = [self._params[slot].logprobs for slot in slots[rows]]
        normaliser = logits.logsumexp(dim=-1, keepdim=True)
        chosen = logits.gather(1, torch.from_numpy(tokens[rows])[:, None])
        ranks = ((logits > chosen).sum(dim=-1) + 1).tolist()
        values, ids = logits.topk(max(wanted), dim=-1)
        top_logprobs, top_ids = (values - normaliser).tolist(), ids.tolist()
        chosen_logprobs = (chosen - normaliser)[:, 0].tolist()
        return {
            row: TokenLogprobs(
                logprob=chosen_logprobs[index],
                rank=ranks[index],
                top=tuple(zip(top_ids[index][:count], top_logprobs[index][:count], strict=True)),
            )
            for index, (row, count) in enumerate(zip(rows.tolist(), wanted, strict=True))
        }


def _threshold(row: torch.Tensor, floor: float, top_k: int, top_p: float) -> float:
    """Smallest logit of `row` [vocab] kept by top_k, then top_p of what is left. Logits below `floor` don't count."""
    count = min(top_k or _NUCLEUS_CANDIDATES, len(row))
    best = row.topk(count).values
    if top_p >= 1:
        return float(best[-1])
    weights = row.exp().masked_fill(row < max(floor, float(best[-1]) if top_k else floor), 0)
    mass = weights.sum(dtype=torch.float64)
    before = best.exp().cumsum(0, dtype=torch.float64) / mass  # mass up to and with each candidate
    if not top_k and before[-1] < top_p:
        best = row.sort(descending=True).values
        before = best.exp().cumsum(0, dtype=torch.float64) / mass
    kept = int((before < top_p).sum()) + 1  # the token that crosses top_p stays
    return float(best[min(kept, len(best)) - 1])
