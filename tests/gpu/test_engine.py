"""The whole GPU path: engine, asynchronous steps and graphs, against transformers on the same GPU."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
transformers = pytest.importorskip("transformers")

from baton.proto.config import BatchConfig, CacheConfig, ModelConfig, WorkerConfig  # noqa: E402
from baton.proto.messages import SamplingParams, TokenLogprobs  # noqa: E402
from baton.worker.engine import Engine  # noqa: E402

pytestmark = pytest.mark.gpu

_TINY = {
    "vocab_size": 3000,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(autouse=True)
def gpu(device: str) -> None:
    if device != "cuda":
        pytest.skip("no GPU")


@pytest.fixture(params=["Llama", "Qwen3"])
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A random model of transformers on the GPU, in float32, and its checkpoint."""
    torch.manual_seed(random.randrange(2**31))
    config = getattr(transformers, f"{request.param}Config")(**_TINY)
    reference = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    reference.save_pretrained(tmp_path)
    yield reference.cuda(), tmp_path
    torch.cuda.empty_cache()


def make_engine(path: Path, dtype: str = "float32", max_num_seqs: int = 32, **batch: int) -> Engine:
    return Engine(
        WorkerConfig(
            name="w",
            role="unified",
            model=ModelConfig(path=str(path), served_names=("m",), dtype=dtype),
            cache=CacheConfig(num_blocks=2000, enable_prefix_caching=False),
            batch=BatchConfig(max_num_seqs=max_num_seqs, **batch),
            device="cuda",
        )
    )


def run(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> tuple[list[list[int]], list[list[TokenLogprobs]]]:
    """All at once; tokens and logprobs per prompt."""
    outputs: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[TokenLogprobs]] = [[] for _ in prompts]
    base = random.randrange(2**40)
    for index, prompt in enumerate(prompts):
        engine.add((base, index), params[index], prompt)
    finished = 0
    while finished < len(prompts):
        for row in engine.step():
            outputs[row.sid[1]] += row.tokens
            logprobs[row.sid[1]] += row.logprobs
            finished += row.finish is not None
    return outputs, logprobs


def random_prompts(count: int) -> list[list[int]]:
    return [[random.randrange(3, 3000) for _ in range(random.choice((1, 5, 40, 150, 600)))] for _ in range(count)]


@pytest.mark.parametrize("budget", [8192, 256])
def test_greedy_tokens_and_logprobs_are_those_of_transformers(model: tuple[Any, Path], budget: int) -> None:
    reference, path = model
    engine = make_engine(path, max_num_batched_tokens=budget)
    prompts = random_prompts(30)
    params = [SamplingParams(max_tokens=20 + i % 3, temperature=0.0, logprobs=i % 2 - 1) for i in range(30)]
    outputs, logprobs = run(engine, prompts, params)
    for prompt, output, rows in zip(prompts, outputs, logprobs, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([prompt + output], device="cuda")).logits[0, len(prompt) - 1 : -1].float()
        best = logits.topk(2).values
        for index, token in enumerate(output):
            assert token == int(logits[index].argmax()) or best[index, 0] - best[index, 1] < 1e-3
        for index, row in enumerate(rows):
            assert abs(row.logprob - float(logits[index].log_softmax(-1)[output[index]])) < 1e-3
    assert engine.batcher.pool.num_used == 0
    engine.close()


def test_streams_do_not_depend_on_batch_or_lag(model: tuple[Any, Path]) -> None:
    """Seeds, penalties, bias, min_tokens and stop tokens give the same stream alone, in a batch, and step by step."""
    _, path = model
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0, "repetition_penalty": 1.5},
        {"temperature": 0.9, "frequency_penalty": 0.7, "presence_penalty": 0.4, "logprobs": 2},
        {"temperature": 1.0, "top_k": 20},
        {"temperature": 0.7, "top_p": 0.8, "min_p": 0.02},
        {"temperature": 0.0, "logit_bias": {7: 3.0, 11: 100.0}, "presence_penalty": 2.0},
        {"temperature": 0.8, "stop_token_ids": tuple(range(3, 300)), "min_tokens": 6},
    ]
    prompts = random_prompts(24)
    params = [SamplingParams(max_tokens=24, seed=i, **kinds[i % len(kinds)]) for i in range(24)]
    engine = make_engine(path)
    together, _ = run(engine, prompts, params)
    engine.close()
    stepwise = make_engine(path, depth=1)
    again, _ = run(stepwise, prompts, params)
    alone = [run(stepwise, [prompt], [one])[0][0] for prompt, one in zip(prompts[:6], params[:6], strict=True)]
    stepwise.close()
    assert together == again
    # The products of one row and of many round differently, so a draw near an edge may differ.
    assert sum(a != b for a, b in zip(alone, together[:6], strict=True)) <= 1


def test_steps_beyond_the_ladder_still_run(model: tuple[Any, Path]) -> None:
    _, path = model
    engine = make_engine(path, max_num_seqs=1100)
    prompts = [[random.randrange(3, 3000)] * 3 for _ in range(1060)]
    params = [SamplingParams(max_tokens=4, temperature=0.0)] * len(prompts)
    outputs, _ = run(engine, prompts, params)
    assert all(len(output) == 4 for output in outputs)
    engine.close()
