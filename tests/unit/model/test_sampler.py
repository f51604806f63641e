"""Sampling: the generator's published vectors, filtered distributions, penalties, logprobs, no effect of the batch."""

import math

import numpy as np
import pytest
import torch

from baton.kernels.reference import TorchOps
from baton.proto.messages import SamplingParams
from baton.worker.attention import choose_ops
from baton.worker.attention.model import Model
from baton.worker.constraints import Masks
from baton.worker.philox import philox4x32, uniforms
from baton.worker.sampler import Sampler

VOCAB = 60
OPS = {"torch": TorchOps(), "default": choose_ops("cpu", Model(torch.float32, 64))}
both = pytest.mark.parametrize("ops", OPS)


def params(**changes: object) -> SamplingParams:
    return SamplingParams(max_tokens=100, **changes)  # type: ignore[arg-type]


def draw(ops: str, logits: torch.Tensor, count: int, **changes: object) -> np.ndarray:
    """`count` tokens at successive output positions of one stream with these logits [vocab]."""
    sampler = Sampler(len(logits), 1, OPS[ops])
    sampler.take_slot(0, params(seed=7, **changes), 0, [])
    rows = logits.repeat(count, 1)
    return sampler.sample(rows, np.zeros(count, dtype=np.int64), np.arange(count))[0]


def assert_distributed(tokens: np.ndarray, probabilities: torch.Tensor) -> None:
    """Chi-squared test with a bound far beyond chance; tokens of probability 0 must not appear."""
    observed = np.bincount(tokens, minlength=len(probabilities))
    expected = probabilities.double().numpy() * len(tokens)
    assert observed[expected == 0].sum() == 0
    rare = expected < 5  # together: where hardly any is expected, one more is a large share
    observed, expected = (np.append(counts[~rare], counts[rare].sum()) for counts in (observed, expected))
    cells = expected > 0
    chi_squared = ((observed[cells] - expected[cells]) ** 2 / expected[cells]).sum()
    freedom = max(int(cells.sum()) - 1, 1)
    assert chi_squared < freedom + 6 * math.sqrt(2 * freedom) + 6


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter: tuple, key: tuple, expected: tuple) -> None:
    """Random123's kat_vectors, philox4x32 with 10 rounds."""
    actual = philox4x32(np.array([counter], dtype=np.uint32), np.array([key], dtype=np.uint32))
    assert tuple(actual[0].tolist()) == expected


def test_uniforms_are_uniform_and_depend_on_every_part_of_the_key() -> None:
    index = np.arange(20000)
    draws = uniforms(np.full(20000, 3), np.zeros(20000), index)
    assert draws.min() >= 0
    assert draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    one = uniforms(np.array([3]), np.array([0]), np.array([5]))
    assert one[0] == draws[5]
    others = [(4, 0, 5), (3 + 2**32, 0, 5), (3, 1, 5), (3, 0, 6)]
    assert len({float(uniforms(*(np.array([v]) for v in key))[0]) for key in others} | {float(one[0])}) == 5


@both
def test_plain_draws_follow_the_softmax(ops: str) -> None:
    logits = torch.randn(VOCAB) * 2
    assert_distributed(draw(ops, logits, 20000, temperature=0.7), (logits / 0.7).softmax(0))


@both
@pytest.mark.parametrize("top_k", [1, 5, VOCAB])
def test_top_k(ops: str, top_k: int) -> None:
    logits = torch.randn(VOCAB)
    kept = torch.full((VOCAB,), -torch.inf)
    best = logits.topk(top_k).indices
    kept[best] = logits[best]
    assert_distributed(draw(ops, logits, 5000, top_k=top_k), kept.softmax(0))


@both
@pytest.mark.parametrize("size", [VOCAB, 5000])
@pytest.mark.parametrize(("top_p", "top_k"), [(0.5, 0), (0.99, 0), (0.6, 10), (1e-9, 0)])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(ops: str, size: int, top_p: float, top_k: int) -> None:
    logits = torch.randn(size)
    by_k = logits if not top_k else torch.where(logits >= logits.topk(top_k).values[-1], logits, -torch.inf)
    probabilities, order = by_k.softmax(0).sort(descending=True)
    kept = order[: int((probabilities.cumsum(0) < top_p).sum()) + 1]
    tokens = draw(ops, logits, 3000, top_p=top_p, top_k=top_k)
    assert set(tokens.tolist()) <= set(kept.tolist())
    if size == VOCAB:
        target = torch.zeros(size)
        target[kept] = by_k.softmax(0)[kept]
        assert_distributed(tokens, target / target.sum())


@both
def test_min_p(ops: str) -> None:
    logits = torch.randn(VOCAB)
    probabilities = logits.softmax(0)
    probabilities[probabilities < 0.3 * probabilities.max()] = 0
    assert_distributed(draw(ops, logits, 5000, min_p=0.3), probabilities / probabilities.sum())


def test_penalties_tell_prompt_from_output() -> None:
    sampler = Sampler(VOCAB, 1, OPS["default"])
    tokens = [3, 3, 4, 5, 5, 6]  # prompt 3 3 4, output 5 5 6
    chosen = params(temperature=0.0, repetition_penalty=2.0, frequency_penalty=0.5, presence_penalty=0.25)
    sampler.take_slot(0, chosen, 3, tokens)
    logits = torch.zeros(1, VOCAB)
    logits[0, :8] = torch.tensor([1.0, -1.0, 0.0, 4.0, -4.0, 8.0, 8.0, 8.0])
    edited = logits.clone()
    sampler._edit(edited, np.array([0]), sampler._needs[:1], np.array([3]))
    expected = [1.0, -1.0, 0.0, 2.0, -8.0, 4.0 - 1.0 - 0.25, 4.0 - 0.5 - 0.25, 8.0]
    assert edited[0, :8].tolist() == pytest.approx(expected)
    sampler.sample(logits.clone(), np.array([0]), np.array([3]))  # draws 7, which counts from now on
    edited = logits.clone()
    sampler._edit(edited, np.array([0]), sampler._needs[:1], np.array([4]))
    assert float(edited[0, 7]) == pytest.approx(4.0 - 0.5 - 0.25)


def test_min_tokens_masks_the_stop_tokens_until_then() -> None:
    sampler = Sampler(VOCAB, 1, OPS["default"])
    sampler.take_slot(0, params(temperature=0.0, min_tokens=2, stop_token_ids=(9, 8)), 1, [1])
    logits = torch.zeros(VOCAB)
    logits[[7, 8, 9]] = torch.tensor([1.0, 2.0, 3.0])
    chosen = [int(sampler.sample(logits[None].clone(), np.array([0]), np.array([i]))[0][0]) for i in range(3)]
    assert chosen == [7, 7, 9]


@both
def test_logit_bias(ops: str) -> None:
    assert set(draw(ops, torch.randn(VOCAB), 50, logit_bias={11: 100.0, 12: -100.0}).tolist()) == {11}


def test_logprobs_are_those_of_the_unmodified_logits() -> None:
    sampler = Sampler(VOCAB, 2, OPS["default"])
    sampler.take_slot(0, params(temperature=0.0), 0, [])
    sampler.take_slot(1, params(temperature=0.0, logit_bias={5: 100.0}, logprobs=3), 0, [])
    logits = torch.randn(2, VOCAB)
    expected = logits[1].log_softmax(0)
    tokens, logprobs = sampler.sample(logits.clone(), np.array([0, 1]), np.array([0, 0]))
    assert tokens[1] == 5
    assert set(logprobs) == {1}
    assert logprobs[1].logprob == pytest.approx(float(expected[5]), abs=1e-5)
    assert logprobs[1].rank == int((expected > expected[5]).sum()) + 1
    values, ids = expected.topk(3)
    assert [token for token, _ in logprobs[1].top] == ids.tolist()
    assert [value for _, value in logprobs[1].top] == pytest.approx(values.tolist(), abs=1e-5)


@both
def test_a_draw_depends_on_seed_sample_and_position_not_on_the_batch(ops: str) -> None:
    kinds = [
        params(temperature=1.3, seed=1),
        params(temperature=0.0),
        params(temperature=0.9, seed=2**63 + 5, top_k=20, top_p=0.8),
        params(temperature=1.0, seed=1, sample_index=1),
        params(temperature=1.0, seed=9, min_p=0.05, presence_penalty=0.4),
    ]
    logits = torch.randn(len(kinds), 2000)
    together = Sampler(2000, len(kinds), OPS[ops])
    for slot, kind in enumerate(kinds):
        together.take_slot(slot, kind, 2, [1, 2])
    index = np.arange(len(kinds))
    expected = together.sample(logits.clone(), index, index + 4)[0]
    for slot, kind in enumerate(kinds):
        alone = Sampler(2000, 8, OPS[ops])
        alone.take_slot(3, kind, 2, [1, 2])
        token = alone.sample(logits[slot : slot + 1].clone(), np.array([3]), np.array([slot + 4]))[0]
        assert token[0] == expected[slot]


@both
def test_a_mask_bans_tokens_and_leaves_other_rows_and_logprobs_alone(ops: str) -> None:
    sampler = Sampler(VOCAB, 3, OPS[ops])
    for slot in range(3):
        temperature = 1.0 if slot else 0.0
        sampler.take_slot(slot, params(grammar="g", temperature=temperature, logprobs=1, min_tokens=9), 0, [])
    logits = torch.randn(3, VOCAB)
    best = logits[1].argmax().item()
    allowed = np.zeros((2, 64), dtype=np.uint8)
    allowed[0, 7] = allowed[1, [3, best]] = 1
    words = np.packbits(allowed, axis=1, bitorder="little").view(np.int32)
    masks = Masks(np.array([0, 2]), words)
    expected = logits.log_softmax(-1)
    tokens, logprobs = sampler.sample(logits.clone(), np.arange(3), np.zeros(3, dtype=np.int64), masks)
    assert tokens[0] == 7
    assert tokens[2] in (3, best)
    for row in range(3):
        assert logprobs[row].logprob == pytest.approx(float(expected[row, tokens[row]]), abs=1e-4)
        assert logprobs[row].top[0][0] == int(expected[row].argmax())
