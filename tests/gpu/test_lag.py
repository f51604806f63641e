"""Steps are planned before the result of the one before is known; streams must not show it.

With two steps in flight (depth 2) against one at a time, and against the CPU's engine. `batch_invariant` makes equal
mean equal: without it the products of a step with other rows in it round differently.
"""

from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

from support.engine import Streams, generate, make_engine, preemptions, random_prompts

from baton.frontend import LLM
from baton.frontend import SamplingParams as Wishes
from baton.proto.config import BatchConfig, CacheConfig
from baton.proto.messages import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0, "repetition_penalty": 1.5},
    {"temperature": 0.9, "frequency_penalty": 0.7, "presence_penalty": 0.4, "logprobs": 2},
    {"temperature": 1.0, "top_k": 20},
    {"temperature": 0.7, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 0.0, "logit_bias": {7: 3.0, 11: 100.0}, "presence_penalty": 2.0},
    {"temperature": 0.8, "stop_token_ids": tuple(range(3, 300)), "min_tokens": 6},
    {"temperature": 0.0, "logprobs": 0, "stop_token_ids": tuple(range(3, 900))},
]
MAX_TOKENS = 64
ROOM = {"wide": {}, "preempting": {"num_blocks": 72, "max_model_len": 1024}}
"""72 blocks hold the longest sequence and little more: streams that grow by 4 blocks each can't all stay."""


def mixed_params(count: int) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=MAX_TOKENS, seed=i, **KINDS[i % len(KINDS)]) for i in range(count)]


def streams(path: Path, prompts: list[list[int]], **options: Any) -> tuple[Streams, int]:
    """Of all prompts at once with mixed parameters, and how many gave way."""
    engine = make_engine(path, **options)
    made = generate(engine, prompts, mixed_params(len(prompts)))
    gave_way = preemptions(engine)
    assert engine.batcher.pool.num_used == 0
    engine.close()
    return made, gave_way


@pytest.mark.parametrize("room", ROOM)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("budget", [8192, 128])
def test_streams_are_those_of_one_step_at_a_time(checkpoint: Path, room: str, dtype: str, budget: int) -> None:
    """Penalties, seeds, bias, stop tokens, min_tokens and logprobs; the same bits, also across preemptions."""
    prompts = random_prompts(28, (1, 5, 40, 150))
    options: dict[str, Any] = {"dtype": dtype, "batch_invariant": True, "max_num_batched_tokens": budget}
    one, _ = streams(checkpoint, prompts, depth=1, **options)
    two, gave_way = streams(checkpoint, prompts, depth=2, **options, **ROOM[room])
    assert (gave_way > 0) == (room == "preempting")
    assert two == one


@pytest.mark.parametrize("room", ROOM)
def test_streams_are_those_of_the_cpu(checkpoint: Path, room: str) -> None:
    prompts = random_prompts(21, (1, 5, 40, 150))
    (expected, expected_logprobs), _ = streams(checkpoint, prompts, device="cpu")
    (actual, logprobs), gave_way = streams(checkpoint, prompts, **ROOM[room])
    assert (gave_way > 0) == (room == "preempting")
    differ = [
        (index, next(at for at, (a, b) in enumerate(zip_longest(*pair)) if a != b), KINDS[index % len(KINDS)])
        for index, pair in enumerate(zip(expected, actual, strict=True))
        if pair[0] != pair[1]
    ]
    # A draw within rounding of one of the 3,000 edges between tokens may fall on either side; rounding is the devices'.
    assert len(differ) <= 3, differ
    for index in set(range(len(prompts))) - {index for index, *_ in differ}:
        for ours, theirs in zip(logprobs[index], expected_logprobs[index], strict=True):
            assert abs(ours.logprob - theirs.logprob) < 1e-3
            assert [token for token, _ in ours.top] == [token for token, _ in theirs.top]


def test_an_aborted_stream_says_no_more_and_disturbs_nobody(checkpoint: Path) -> None:
    """Aborts while steps that compute the stream are in flight, and newcomers that take its slot and blocks at once."""
    prompts, params = random_prompts(24, (1, 5, 40, 150)), mixed_params(24)
    undisturbed, _ = streams(checkpoint, prompts, batch_invariant=True, depth=1)
    engine = make_engine(checkpoint, batch_invariant=True, max_num_seqs=12, num_blocks=200)
    outputs: dict[int, list[int]] = {index: [] for index in range(24)}
    aborted: set[int] = set()
    for index in range(12):
        engine.add((1, index), params[index], prompts[index])
    open_streams, newcomer = set(range(12)), 12
    while open_streams:
        for row in engine.step():
            index = row.sid[1]
            assert index not in aborted
            outputs[index] += row.tokens
            if row.finish is not None:
                open_streams.discard(index)
        # Every stream with an even number is dropped after some tokens of its own, and another one takes its place.
        for index in [i for i in open_streams if i % 2 == 0 and len(outputs[i]) > i % 5 + 1]:
            assert engine.batcher.steps_in_flight
            engine.abort((1, index))
            aborted.add(index)
            open_streams.discard(index)
            if newcomer < 24:
                engine.add((1, newcomer), params[newcomer], prompts[newcomer])
                open_streams.add(newcomer)
                newcomer += 1
    assert len(aborted) > 6
    for index, output in outputs.items():
        whole = undisturbed[0][index]
        assert output == (whole[: len(output)] if index in aborted or index >= newcomer else whole)
    while engine.step():
        pass
    assert engine.batcher.pool.num_used == 0
    engine.close()


def test_stop_strings_end_a_stream_where_they_stand(smollm2: Path) -> None:
    """The tokens that steps in flight had added are not in the answer, and their blocks come back."""

    def answers(depth: int, stop: list[str] | None) -> list[str]:
        batch = BatchConfig(depth=depth, target_itl_ms=0.0)
        options: dict[str, Any] = {"dtype": "float32", "device": "cuda", "batch_invariant": True, "max_model_len": 512}
        with LLM(str(smollm2), batch=batch, cache=CacheConfig(num_blocks=400), **options) as llm:
            params = Wishes(temperature=0.8, seed=3, max_tokens=80, ignore_eos=True, stop=stop)
            texts = [f"Write a sentence about the number {number}." for number in range(12)]
            outputs = [output.outputs[0] for output in llm.generate(texts, params)]
            again = llm.generate(texts[0], params)[0].outputs[0]
            assert again.text == outputs[0].text
            return [output.text for output in outputs]

    whole = answers(1, None)
    assert answers(2, None) == whole
    stop = [" the", "."]
    expected = [text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))] for text in whole]
    assert answers(2, stop) == expected
    assert expected != whole
