"""Logits to tokens, for all rows of a step at once.

Per stream the sampler keeps its parameters, as columns of numpy arrays indexed by slot, and token counts if it has
penalties. A step looks at the union of its rows' flags, so that what nobody asked for costs nothing: a batch of plain
greedy rows is one argmax.

Order of operations, as in vLLM: logit_bias and min_tokens, penalties, grammar, temperature, min_p, top_k, top_p, draw.
"""

from collections import Counter
from enum import IntFlag

import numpy as np
import torch

from baton.kernels.ops import Ops
from baton.proto.messages import SamplingParams, TokenLogprobs
from baton.worker.constraints import Masks
from baton.worker.philox import uniforms

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy."""


class Need(IntFlag):
    """What a row asks for beyond argmax."""

    DRAW = 1
    BIAS = 2
    MIN_TOKENS = 4
    PENALTIES = 8
    LOGPROBS = 16
    GRAMMAR = 32


_EDITS_LOGITS = Need.BIAS | Need.MIN_TOKENS | Need.PENALTIES


class _TokenCounts:
    """The distinct tokens of one stream, and what its penalties count of each. Few beside the vocabulary."""

    def __init__(self, tokens: list[int], prompt_len: int) -> None:
        output = Counter(tokens[prompt_len:])
        seen = list(dict.fromkeys(tokens))
        self._index = {token: index for index, token in enumerate(seen)}
        self._tokens = np.array(seen, dtype=np.int64)
        self._output = np.array([output[token] for token in seen], dtype=np.float32)

    def add(self, token: int) -> None:
        """One more output token."""
        if token not in self._index:
            self._index[token] = len(self._index)
            if len(self._index) > len(self._tokens):
                room = max(64, len(self._tokens))
                self._tokens = np.concatenate([self._tokens, np.zeros(room, dtype=np.int64)])
                self._output = np.concatenate([self._output, np.zeros(room, dtype=np.float32)])
            self._tokens[self._index[token]] = token
        self._output[self._index[token]] += 1

    def penalise(self, logits: np.ndarray, params: SamplingParams) -> None:
        """logits float32 [vocab], in place. Repetition (Keskar et al., 2019) counts the prompt too, the rest do not."""
        tokens, output = self._tokens[: len(self._index)], self._output[: len(self._index)]
        values = logits[tokens]
        repetition = np.float32(params.repetition_penalty)
        values = np.where(values > 0, values / repetition, values * repetition)
        values -= np.float32(params.frequency_penalty) * output
        values -= np.float32(params.presence_penalty) * (output > 0)
        logits[tokens] = values


def _find_needs(params: SamplingParams) -> Need:
    needs = Need(0)
    if params.logit_bias:
        needs |= Need.BIAS
    if params.grammar:
        needs |= Need.GRAMMAR
    elif params.min_tokens > 0 and params.stop_token_ids:
        needs |= Need.MIN_TOKENS  # a grammar's masks see to it themselves
    if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
        needs |= Need.PENALTIES
    if params.logprobs >= 0:
        needs |= Need.LOGPROBS
    if params.temperature >= GREEDY_BELOW:
        needs |= Need.DRAW
    return needs


class SlotParams:
    """The sampling parameters of every slot, as columns."""

    def __init__(self, num_slots: int) -> None:
        self._needs = np.zeros(num_slots, dtype=np.int32)
        self._temperature = np.ones(num_slots, dtype=np.float32)
        self._top_k = np.zeros(num_slots, dtype=np.int64)
        self._top_p = np.ones(num_slots, dtype=np.float64)
        self._min_p = np.zeros(num_slots, dtype=np.float32)
        self._seeds = np.zeros(num_slots, dtype=np.uint64)
        self._sample_indices = np.zeros(num_slots, dtype=np.uint32)
        self._params: list[SamplingParams | None] = [None] * num_slots

    def take_params(self, slot: int, params: SamplingParams) -> None:
        """A stream with these parameters takes a slot, whoever had it before."""
        self._needs[slot] = _find_needs(params)
        self._params[slot] = params
        self._temperature[slot] = params.temperature
        self._top_k[slot] = params.top_k
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._seeds[slot] = np.uint64(params.seed & 0xFFFFFFFFFFFFFFFF)
        self._sample_indices[slot] = params.sample_index


class Sampler(SlotParams):
    """Draws tokens; owns the sampling state of every slot. Not thread-safe."""

    def __init__(self, vocab_size: int, num_slots: int, ops: Ops) -> None:
        super().__init__(num_slots)
        self.vocab_size = vocab_size
        self._ops = ops
        self._counts: dict[int, _TokenCounts] = {}

    def take_slot(self, slot: int, params: SamplingParams, prompt_len: int, tokens: list[int]) -> None:
        """A stream with these known tokens (prompt, then output so far) takes a slot, whoever had it before."""
        self.take_params(slot, params)
        self._counts.pop(slot, None)
        if self._needs[slot] & Need.PENALTIES:
            self._counts[slot] = _TokenCounts(tokens, prompt_len)

    def sample(
        self, logits: torch.Tensor, slots: np.ndarray, output_indices: np.ndarray, masks: Masks | None = None
    ) -> tuple[np.ndarray, dict[int, TokenLogprobs]]:
        """One token per row.

        logits float32 [n, vocab_size], may be overwritten; slots int [n]; output_indices int [n], the position of the
        token among its stream's output; masks are of the rows with a grammar. Returns int64 [n] and the
        log-probabilities of the rows that asked for them.
        """
        needs = self._needs[slots]
        union = int(np.bitwise_or.reduce(needs)) if len(needs) else 0
        asked = np.flatnonzero(needs & Need.LOGPROBS) if union & Need.LOGPROBS else None
        unmodified = logits
        if asked is not None:
            unmodified = logits[torch.from_numpy(asked)]  # a copy: the edits below are in place
        if union & _EDITS_LOGITS:
            self._edit(logits, slots, needs, output_indices)
        if masks is not None:
            banned = torch.from_numpy(~masks.allowed(self.vocab_size))
            for index, row in enumerate(masks.rows):
                logits[row].masked_fill_(banned[index], -torch.inf)
        if union & Need.DRAW:
            tokens = self._choose(logits, slots, needs, output_indices)
        else:
            tokens = logits.argmax(dim=-1).numpy()
        if union & Need.PENALTIES:
            self._count(slots, tokens)
        return tokens, {} if asked is None else self._logprobs(unmodified, asked, slots, tokens)

    def _edit(self, logits: torch.Tensor, slots: np.ndarray, needs: np.ndarray, output_indices: np.ndarray) -> None:
        """Bias, min_tokens and penalties, in place."""
        for row in np.flatnonzero(needs & (Need.BIAS | Need.MIN_TOKENS)):
            params = self._params[slots[row]]
            assert params is not None
            if params.logit_bias:
                biased = torch.tensor(list(params.logit_bias), dtype=torch.int64)
                logits[row, biased] += torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            if needs[row] & Need.MIN_TOKENS and output_indices[row] < params.min_tokens:
                logits[row, list(params.stop_token_ids)] = -torch.inf
        as_numpy = logits.numpy()
        for row in np.flatnonzero(needs & Need.PENALTIES):
            params = self._params[slots[row]]
            assert params is not None
            self._counts[int(slots[row])].penalise(as_numpy[row], params)

    def _choose(
        self, logits: torch.Tensor, slots: np.ndarray, needs: np.ndarray, output_indices: np.ndarray
    ) -> np.ndarray:
        """Greedy rows by argmax, the others by a draw."""
        drawn = np.flatnonzero(needs & Need.DRAW)
        if len(drawn) == len(slots):
            return self._draw(logits, slots, output_indices)
        tokens = np.empty(len(slots), dtype=np.int64)
        greedy = np.flatnonzero(needs & Need.DRAW == 0)
        tokens[greedy] = logits[torch.from_numpy(greedy)].argmax(dim=-1).numpy()
        tokens[drawn] = self._draw(logits[torch.from_numpy(drawn)], slots[drawn], output_indices[drawn])
        return tokens

    def _draw(self, logits: torch.Tensor, slots: np.ndarray, output_indices: np.ndarray) -> np.ndarray:
        return self._ops.draw(
            logits,
            torch.from_numpy(self._temperature[slots]),
            torch.from_numpy(self._top_k[slots]),
            torch.from_numpy(self._top_p[slots]),
            torch.from_numpy(self._min_p[slots]),
            torch.from_numpy(uniforms(self._seeds[slots], self._sample_indices[slots], output_indices)),
        ).numpy()

    def _count(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        for slot, token in zip(slots.tolist(), tokens.tolist(), strict=True):
            if slot in self._counts:
                self._counts[slot].add(token)

    def _logprobs(
        self, logits: torch.Tensor, rows: np.ndarray, slots: np.ndarray, tokens: np.ndarray
    ) -> dict[int, TokenLogprobs]:
        """logits [len(rows), vocab], as the model gave them."""
        wanted = [self._params[slot].logprobs for slot in slots[rows]]
        normaliser = self._ops.logsumexp(logits)[:, None]
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
