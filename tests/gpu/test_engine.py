"""Engine, asynchronous steps and graphs: tiny random models on the GPU against transformers on the same GPU."""

import json
import random
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers

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


def test_serving_takes_no_memory_from_the_driver(model: tuple[Any, Path]) -> None:
    """Steps of every kind fit into what start reserved: an allocation would wait for the device to be idle."""
    _, path = model
    engine = make_engine(path, max_num_batched_tokens=4096, max_num_seqs=700)
    reserved = torch.cuda.memory_reserved()
    prompts = [[random.randrange(3, 3000)] * random.choice((1, 9, 90, 500)) for _ in range(800)]
    params = [SamplingParams(max_tokens=random.randrange(1, 40), temperature=0.0) for _ in prompts]
    generate(engine, prompts, params)
    assert torch.cuda.memory_reserved() == reserved
    engine.close()


def test_constrained_streams_keep_to_their_grammar_and_leave_others_alone(model: tuple[Any, Path]) -> None:
    """Ids below 256 are bytes, 256 is the end; the model's other 2,700 ids have no text and are never allowed."""
    _, path = model
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(models.BPE({char: id for id, char in enumerate(characters)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>"])
    tokenizer.save(str(path / "tokenizer.json"))
    grammar = json.dumps({"grammars": [{"lark_grammar": "start: /[a-f]{3,30}(-[0-9]{2})?/"}]})
    prompts = random_prompts(16)
    free = [SamplingParams(max_tokens=24, seed=i, temperature=0.8, logprobs=i % 3 - 1) for i in range(16)]
    params = [
        msgspec.structs.replace(p, max_tokens=99, grammar=grammar, stop_token_ids=(256,), min_tokens=5 * (i % 4 == 1))
        if i % 2
        else p
        for i, p in enumerate(free)
    ]
    for depth in (1, 2):
        engine = make_engine(path, depth=depth)
        alone, _ = generate(engine, prompts, free)
        outputs, _ = generate(engine, prompts, params)
        engine.close()
        for index, output in enumerate(outputs):
            if index % 2:
                assert output.pop() == 256
                text = "".join(characters[id] for id in output)
                assert re.fullmatch("[a-f]{3,30}(-[0-9]{2})?", text), text
                assert len(output) >= params[index].min_tokens
        # The products of another number of rows round differently, so a draw near an edge may differ.
        assert sum(outputs[i] != alone[i] for i in range(0, 16, 2)) <= 2
