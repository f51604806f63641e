"""Engine, asynchronous steps and graphs: tiny random models on the GPU against transformers on the same GPU."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support.engine import generate, make_engine, random_prompts

from baton.proto.messages import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]


@pytest.mark.parametrize("budget", [8192, 256])
def test_greedy_tokens_and_logprobs_are_those_of_transformers(model: tuple[Any, Path], budget: int) -> None:
    reference, path = model
    engine = make_engine(path, max_num_batched_tokens=budget)
    prompts = random_prompts(30)
    params = [SamplingParams(max_tokens=20 + i % 3, temperature=0.0, logprobs=i % 2 - 1) for i in range(30)]
    outputs, logprobs = generate(engine, prompts, params)
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


def test_steps_beyond_the_ladder_still_run(model: tuple[Any, Path]) -> None:
    _, path = model
    engine = make_engine(path, max_num_seqs=1100)
    prompts = [[random.randrange(3, 3000)] * 3 for _ in range(1060)]
    params = [SamplingParams(max_tokens=4, temperature=0.0)] * len(prompts)
    outputs, _ = generate(engine, prompts, params)
    assert all(len(output) == 4 for output in outputs)
    engine.close()
