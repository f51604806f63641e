"""A real model on the GPU: SmolLM2 against transformers on the same GPU and the same weights."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("transformers")

from support.deployment import Deployment
from support.engine import generate, make_engine, preemptions
from support.prompts import excerpts, library_tokens
from support.reference import Reference

from baton.proto.messages import SamplingParams

pytestmark = pytest.mark.gpu

MAX_MODEL_LEN = 2048
MAX_TOKENS = 64
LENGTHS = [1, 2, 3, 15, 16, 17, 31, 33, 64, 65, 100, 127, 129, 200, 255, 300, 511, 513, 700, 1000, 1200, 1500]
TIE = 1e-4
"""Where two logits of the reference are closer than this, either may be the larger in another order of summation."""
MODES = {
    "whole prompts": {},
    "in chunks": {"max_num_batched_tokens": 96},
    "prefix cache": {"caching": True},
    # Room for the longest prompt and little more: 30 streams that grow by 4 blocks each can't all stay.
    "preempting": {"num_blocks": 130},
    "preempting, in chunks, prefix cache": {"num_blocks": 130, "max_num_batched_tokens": 96, "caching": True},
}


@pytest.fixture(scope="module")
def prompts(smollm2: Path) -> list[list[int]]:
    """30 prompts of prose and code; eight of them begin as another one does."""
    ids = library_tokens(smollm2)
    separate = excerpts(ids, LENGTHS, seed=11)
    forks = [separate[-1][:cut] + ids[cut : cut + 20] for cut in (16, 40, 64, 160, 400, 800, 1200, 1499)]
    return separate + forks


@pytest.fixture(scope="module")
def reference(smollm2: Path) -> Reference:
    return Reference(smollm2, "cuda")


@pytest.mark.parametrize("mode", MODES)
def test_greedy_tokens_are_those_of_transformers(
    mode: str, smollm2: Path, prompts: list[list[int]], reference: Reference
) -> None:
    """Every token is the reference's best after the prompt and the tokens before it: so is the whole stream."""
    engine = make_engine(smollm2, max_model_len=MAX_MODEL_LEN, **MODES[mode])  # type: ignore[arg-type]
    params = [SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=0)] * len(prompts)
    for _ in range(2 if "cache" in mode else 1):
        outputs, logprobs = generate(engine, prompts, params)
        for prompt, output, rows in zip(prompts, outputs, logprobs, strict=True):
            assert_greedy(reference, prompt, output, [row.logprob for row in rows])
    assert ("preempting" in mode) == (preemptions(engine) > 0)
    assert ("cache" in mode) == (engine.batcher.load(with_holdings=False).cached_tokens > 0)
    assert engine.batcher.pool.num_used == 0
    engine.close()


@pytest.mark.parametrize("flags", [(), ("--max-num-batched-tokens", "160")], ids=["whole prompts", "in chunks"])
def test_split_pools_give_the_same_tokens(
    flags: tuple[str, ...], smollm2: Path, prompts: list[list[int]], reference: Reference
) -> None:
    """Served over HTTP: prefill and decode in two processes on one GPU."""
    split = ("--prefill", "1", "--decode", "1", "--device", "cuda", "--gpus", "0", "--dtype", "float32")
    size = ("--num-blocks", "2000", "--max-model-len", str(MAX_MODEL_LEN))
    greedy: dict[str, Any] = {"temperature": 0, "logprobs": 1, "ignore_eos": True, "return_token_ids": True}
    with Deployment(*split, *size, *flags, model=str(smollm2)) as deployment:
        answers = deployment.complete_all(prompts, max_tokens=MAX_TOKENS, **greedy)
        assert deployment.total("baton_tokens_total", 'source="pulled"') > 0
        deployment.wait_idle()
    for prompt, answer in zip(prompts, answers, strict=True):
        choice = answer["choices"][0]
        assert_greedy(reference, prompt, choice["token_ids"], choice["logprobs"]["token_logprobs"])


def assert_greedy(reference: Reference, prompt: list[int], output: list[int], logprobs: list[float]) -> None:
    """Every token is the reference's best after those before it, with the log-probability that it gives."""
    assert len(output) == len(logprobs) == MAX_TOKENS
    logits = reference.logits(prompt, output)
    best = logits.topk(2).values
    tied = best[:, 0] - best[:, 1] < TIE
    chosen = torch.tensor(output, device="cuda")
    assert ((logits.argmax(-1) == chosen) | tied).all()
    expected = logits.log_softmax(-1).gather(1, chosen[:, None])[:, 0]
    assert (torch.tensor(logprobs, device="cuda") - expected).abs().max() < 1e-3


def test_float32_is_not_rounded_to_tf32(smollm2: Path, prompts: list[list[int]], reference: Reference) -> None:
    """TF32 keeps 10 bits of each factor: its logits would be off by some 1e-2."""
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        engine = make_engine(smollm2, max_model_len=MAX_MODEL_LEN)
        assert not torch.backends.cuda.matmul.allow_tf32, "a float32 engine turns it off, whatever was set before"
        params = [SamplingParams(max_tokens=1, temperature=0.0, logprobs=0)] * len(prompts)
        outputs, logprobs = generate(engine, prompts, params)
        engine.close()
    finally:
        torch.backends.cuda.matmul.allow_tf32 = False
    for prompt, output, (row,) in zip(prompts, outputs, logprobs, strict=True):
        expected = float(reference.logits(prompt, output)[0].log_softmax(-1)[output[0]])
        assert abs(row.logprob - expected) < 2e-4


def test_bfloat16_is_as_near_to_transformers_as_transformers_is_to_itself(
    smollm2: Path, prompts: list[list[int]]
) -> None:
    """The largest logprob difference to it, against the one between its two implementations of attention."""
    engine = make_engine(smollm2, dtype="bfloat16", max_model_len=MAX_MODEL_LEN)
    params = [SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0, logprobs=0)] * len(prompts)
    outputs, logprobs = generate(engine, prompts, params)
    engine.close()
    ours = torch.tensor([row.logprob for rows in logprobs for row in rows])
    sdpa, eager, exact = (
        chosen_logprobs(Reference(smollm2, "cuda", dtype, attention), prompts, outputs)
        for dtype, attention in (
            (torch.bfloat16, "sdpa"),
            (torch.bfloat16, "eager"),
            (torch.float32, "sdpa"),
        )
    )
    theirs = (sdpa - eager).abs().max()
    to_sdpa, to_eager = ((ours - other).abs().max() for other in (sdpa, eager))
    print(f"largest logprob difference to sdpa {to_sdpa:.3f}, to eager {to_eager:.3f}, between the two {theirs:.3f}")
    for name, values in {"ours": ours, "sdpa": sdpa, "eager": eager}.items():
        off = (values - exact).abs()
        print(f"{name}: off float32 by {off.mean():.4f} on average, {off.max():.3f} at most")
    assert min(to_sdpa, to_eager) <= theirs


def chosen_logprobs(reference: Reference, prompts: list[list[int]], outputs: list[list[int]]) -> torch.Tensor:
    """Of every output token, one after the other."""
    parts = []
    for prompt, output in zip(prompts, outputs, strict=True):
        logprobs = reference.logits(prompt, output).log_softmax(-1)
        parts.append(logprobs.gather(1, torch.tensor(output, device="cuda")[:, None])[:, 0].cpu())
    return torch.cat(parts)
