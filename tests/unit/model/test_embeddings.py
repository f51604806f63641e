"""Pooled hidden states equal those of transformers in float32, and do not show how they were computed."""

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.engine import make_engine, preemptions

from baton.proto.messages import SamplingParams
from baton.worker.engine import Engine

transformers = pytest.importorskip("transformers")

TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
}
POOLINGS = ["LAST", "MEAN"]
CLOSE = 1e-4
"""As far as rounding goes in vectors of length 1."""


def run(engine: Engine, asked: list[tuple[list[int], SamplingParams]]) -> list[Any]:
    """A vector float32 [hidden_size], or output tokens, of each, all at once."""
    base = random.randrange(1, 2**40)
    results: list[Any] = [[] for _ in asked]
    for index, (prompt, params) in enumerate(asked):
        engine.add((base, index), params, prompt)
    ended = 0
    while ended < len(asked):
        for row in engine.step():
            if row.vector:
                results[row.sid[1]] = np.frombuffer(row.vector, dtype="<f4")
            else:
                results[row.sid[1]] += row.tokens
            ended += row.finish is not None
    return results


def pool(pooling: str) -> SamplingParams:
    return SamplingParams(max_tokens=0, temperature=0.0, pooling=pooling)


def expected(model: Any, prompt: list[int], pooling: str) -> np.ndarray:
    with torch.inference_mode():
        hidden = model(torch.tensor([prompt])).last_hidden_state[0].double()
    return (hidden[-1] if pooling == "LAST" else hidden.mean(0)).numpy()


def distance(vector: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference once both have length 1."""
    return float(np.abs(vector / np.linalg.norm(vector) - reference / np.linalg.norm(reference)).max())


@pytest.fixture(scope="module", params=["Llama", "Mistral", "Qwen2", "Qwen3"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A random model, saved without a language model head, as embedding models are."""
    torch.manual_seed(random.randrange(2**31))
    config = getattr(transformers, f"{request.param}Config")(**TINY)
    model = getattr(transformers, f"{request.param}Model")(config).eval()
    path = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return model, path


@pytest.fixture
def make(checkpoint: tuple[Any, Path]) -> Iterator[Callable[..., Engine]]:
    """Engines over the checkpoint, closed at the end."""
    engines: list[Engine] = []

    def make(**fields: Any) -> Engine:
        engines.append(make_engine(checkpoint[1], device="cpu", **{"num_blocks": 100, **fields}))
        return engines[-1]

    yield make
    for engine in engines:
        assert engine.batcher.pool.num_used == 0
        engine.close()


def draw(*lengths: int) -> list[list[int]]:
    return [[random.randrange(3, 300) for _ in range(length)] for length in lengths]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_those_of_transformers(
    checkpoint: tuple[Any, Path], make: Callable[..., Engine], pooling: str
) -> None:
    prompts = draw(1, 2, 15, 16, 17, 64, 200, 256)
    vectors = run(make(max_num_batched_tokens=48), [(prompt, pool(pooling)) for prompt in prompts])
    for prompt, vector in zip(prompts, vectors, strict=True):
        assert distance(vector, expected(checkpoint[0], prompt, pooling)) < CLOSE


@pytest.mark.parametrize("pooling", POOLINGS)
def test_neither_chunks_nor_the_prefix_cache_nor_neighbours_nor_a_preemption_change_a_vector(
    make: Callable[..., Engine], pooling: str
) -> None:
    [prompt, *others] = draw(150, 90, 60)
    [alone] = run(make(max_num_batched_tokens=512), [(prompt, pool(pooling))])
    cached = make(max_num_batched_tokens=32, caching=True)
    greedy = SamplingParams(max_tokens=40, temperature=0.0)
    beside = [(other, greedy) for other in others] + [(prompt, pool(pooling)), (others[0], pool("MEAN"))]
    tokens = run(cached, beside[:2])
    for _ in range(2):
        *mixed, vector, _ = run(cached, beside)
        assert mixed == tokens
        np.testing.assert_allclose(vector, alone, rtol=1e-6, atol=1e-6)
    tight = make(max_num_batched_tokens=6, max_num_seqs=4, num_blocks=15, max_model_len=200)
    *mixed, vector = run(tight, [*((other[:16], greedy) for other in others), (prompt, pool(pooling))])
    assert preemptions(tight) > 0
    np.testing.assert_allclose(vector, alone, rtol=1e-6, atol=1e-6)


def test_a_longer_prompt_than_the_model_takes_is_refused(make: Callable[..., Engine]) -> None:
    engine = make()
    with pytest.raises(ValueError, match="1 to 256 tokens"):
        engine.add((1, 1), pool("LAST"), draw(257)[0])


@pytest.mark.parametrize("pooling", POOLINGS)
def test_smollm2(smollm2: Path, pooling: str) -> None:
    model = transformers.AutoModel.from_pretrained(smollm2, dtype=torch.float32).eval()
    prompts = [[random.randrange(100, 40000) for _ in range(length)] for length in (1, 7, 33, 150)]
    engine = make_engine(smollm2, device="cpu", num_blocks=100, max_model_len=512, max_num_batched_tokens=64)
    vectors = run(engine, [(prompt, pool(pooling)) for prompt in prompts])
    engine.close()
    for prompt, vector in zip(prompts, vectors, strict=True):
        assert distance(vector, expected(model, prompt, pooling)) < CLOSE
