"""Pooled hidden states on the GPU: against transformers on the same GPU, in and out of graphs, beside decode rows."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from support.engine import make_engine, preemptions, random_prompts

from baton.proto.messages import SamplingParams
from baton.worker.cuda.graphs import Size
from baton.worker.cuda.runner import CudaRunner
from baton.worker.engine import Engine

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

CLOSE = 1e-4
GREEDY = SamplingParams(max_tokens=24, temperature=0.0)


def pool(pooling: str) -> SamplingParams:
    return SamplingParams(max_tokens=0, temperature=0.0, pooling=pooling)


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


def unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)


def expected(model: Any, prompt: list[int], pooling: str) -> np.ndarray:
    with torch.inference_mode():
        hidden = model.base_model(torch.tensor([prompt], device="cuda")).last_hidden_state[0].double()
    return (hidden[-1] if pooling == "LAST" else hidden.mean(0)).cpu().numpy()


@pytest.mark.parametrize("pooling", ["LAST", "MEAN"])
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize(
    "batch", [{"max_num_batched_tokens": 8192}, {"max_num_batched_tokens": 200}, {"max_num_seqs": 4}]
)
def test_vectors_are_those_of_transformers(
    model: tuple[Any, Path], pooling: str, depth: int, batch: dict[str, int]
) -> None:
    """With 4 slots a step pools more tokens than its graph has sampled rows, and runs in none."""
    reference, path = model
    engine = make_engine(path, depth=depth, **batch)  # type: ignore[arg-type]
    prompts = [*random_prompts(24), [5] * 1024]
    vectors = run(engine, [(prompt, pool(pooling)) for prompt in prompts])
    for prompt, vector in zip(prompts, vectors, strict=True):
        assert np.abs(unit(vector) - unit(expected(reference, prompt, pooling))).max() < CLOSE
    assert engine.batcher.pool.num_used == 0
    engine.close()


@pytest.mark.parametrize("depth", [1, 2])
def test_streams_and_vectors_beside_each_other_are_as_alone(model: tuple[Any, Path], depth: int) -> None:
    reference, path = model
    engine = make_engine(path, depth=depth, max_num_batched_tokens=256, caching=True)
    prompts = random_prompts(12)
    alone = run(engine, [(prompt, GREEDY) for prompt in prompts])
    kinds = [GREEDY, pool("LAST"), pool("MEAN")]
    mixed = run(engine, [(prompt, params) for prompt in prompts for params in kinds])
    for index, prompt in enumerate(prompts):
        tokens, last, mean = mixed[3 * index : 3 * index + 3]
        if tokens != alone[index]:  # products of another number of rows round differently
            first = next(i for i, pair in enumerate(zip(tokens, alone[index], strict=True)) if len(set(pair)) > 1)
            with torch.inference_mode():
                ids = torch.tensor([prompt + alone[index][:first]], device="cuda")
                best = reference(ids).logits[0, -1].float().topk(2).values
            assert best[0] - best[1] < 1e-3
        for vector, pooling in ((last, "LAST"), (mean, "MEAN")):
            assert np.abs(unit(vector) - unit(expected(reference, prompt, pooling))).max() < CLOSE
    engine.close()


def test_one_that_gives_way_at_depth_2_gives_the_same_vector(checkpoint: Path) -> None:
    prompt = [random.randrange(3, 3000) for _ in range(800)]
    wide = make_engine(checkpoint)
    [alone] = run(wide, [(prompt, pool("MEAN"))])
    wide.close()
    tight = make_engine(checkpoint, depth=2, max_num_batched_tokens=16, num_blocks=68)
    grows = SamplingParams(max_tokens=200, temperature=0.0)
    *_, vector = run(tight, [*(([7 + n] * 16, grows) for n in range(4)), (prompt, pool("MEAN"))])
    assert preemptions(tight) > 0
    np.testing.assert_allclose(unit(vector), unit(alone), atol=CLOSE)
    tight.close()


def test_decode_steps_stay_in_their_graphs_and_small_mixed_ones_too(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vectors are made in the graphs of mixed steps, as far as those reach; steps of decode rows alone know nothing."""
    fitted: list[tuple[bool, Size | None]] = []
    fit = CudaRunner._fit

    def watch(self: CudaRunner, rows: Any, lists: Any, pooled: int) -> Any:
        size, layout = fit(self, rows, lists, pooled)
        fitted.append((pooled > 0, size))
        return size, layout

    engine = make_engine(checkpoint, max_num_seqs=64, max_num_batched_tokens=64)
    monkeypatch.setattr(CudaRunner, "_fit", watch)  # not before: the largest steps fit into no graph
    run(engine, [([5] * 40, GREEDY), ([6] * 40, pool("MEAN")), ([7] * 300, pool("LAST"))])
    engine.close()
    assert {True, False} == {pooled for pooled, _ in fitted}
    assert all(size is not None and size.mixed for pooled, size in fitted if pooled)
    assert any(size is not None and not size.mixed for pooled, size in fitted if not pooled)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_smollm2(smollm2: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    reference = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval().cuda()
    engine = make_engine(smollm2, dtype=dtype, max_model_len=1024)
    prompts = [[random.randrange(100, 40000) for _ in range(length)] for length in (1, 17, 150, 900)]
    for pooling in ("LAST", "MEAN"):
        vectors = run(engine, [(prompt, pool(pooling)) for prompt in prompts])
        cosines = [
            float(unit(vector) @ unit(expected(reference, prompt, pooling)))
            for prompt, vector in zip(prompts, vectors, strict=True)
        ]
        print(f"{dtype} {pooling}: smallest cosine {min(cosines):.6f}")
        assert min(cosines) > (1 - CLOSE if dtype == "float32" else 0.99)
    engine.close()
