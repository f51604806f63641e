"""Greedy output equals transformers' token for token, however the work is split; seeded samples are equal too."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from support.deployment import Deployment
from support.prompts import excerpts, library_tokens
from support.reference import Greedy, Reference

from baton.worker.weights.resolve import resolve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # the reference's 30 prompts come before the first test

MAX_TOKENS = 24
LONG_TOKENS = 270
"""Four streams that grow by so much beside the others can't stay in the preempting modes' 64 blocks."""
TIE = 1e-3
"""Where the reference's own two best logits are closer than this, either may be chosen."""
SAMPLED: dict[str, list[list[int]]] = {}
"""Mode -> seeded samples, compared across modes."""

ONE_POOL = ["--kv-transfer", "local", "--no-enable-prefix-caching"]
MODES = {
    "1 prefill + 1 decode": ["--prefill", "1", "--decode", "1", "--max-num-batched-tokens", "128"],
    "2 prefill + 2 decode": ["--prefill", "2", "--decode", "2"],
    "1 prefill + 1 decode over tcp": ["--prefill", "1", "--decode", "1", "--kv-transfer", "tcp"],
    "1 prefill + 1 decode over gloo": ["--prefill", "1", "--decode", "1", "--kv-transfer", "gloo"],
    "unified": ["--unified", "1"],
    "1 + 1, prefix cache off": ["--prefill", "1", "--decode", "1", "--no-enable-prefix-caching"],
    "unified, prefix cache off": ["--unified", "1", "--no-enable-prefix-caching", "--max-num-batched-tokens", "96"],
    "1 + 1, preempting": ["--prefill", "1", "--decode", "1", "--num-blocks", "64"],
    "2 + 2 in one pool": ["--prefill", "2", "--decode", "2", *ONE_POOL],
    "1 + 1 in one pool, preempting": ["--prefill", "1", "--decode", "1", "--num-blocks", "64", *ONE_POOL],
    "unified, preempting": ["--unified", "1", "--num-blocks", "64"],
}


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[list[int]]:
    """30 prompts of 1 to 700 tokens of prose and code; ten of them share long beginnings."""
    ids = library_tokens(model_dir)
    lengths = [1, 2, 5, 15, 16, 17, 31, 32, 33, 48, 64, 100, 120, 150, 200, 250, 300, 400, 600, 700]
    separate = excerpts(ids, lengths, seed=7)
    shared = ids[1000:1170]
    forks = [
        shared[:cut] + ids[start : start + 9]
        for cut, start in zip([160] * 5 + [96] * 3 + [170] * 2, range(2000, 3000, 100), strict=True)
    ]
    return separate + forks


@pytest.fixture(scope="module")
def growing(prompts: list[list[int]]) -> list[list[int]]:
    """Four prompts of 16 tokens."""
    return [prompts[-1][start : start + 16] for start in (0, 32, 64, 96)]


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


@pytest.fixture(scope="module")
def expected(reference: Reference, prompts: list[list[int]]) -> list[Greedy]:
    return [reference.greedy([prompt], MAX_TOKENS)[0] for prompt in prompts]


@pytest.fixture(scope="module")
def expected_growing(reference: Reference, growing: list[list[int]]) -> list[Greedy]:
    return reference.greedy(growing, LONG_TOKENS)


@pytest.mark.parametrize("mode", MODES)
def test_tokens_are_those_of_transformers(
    mode: str,
    prompts: list[list[int]],
    expected: list[Greedy],
    growing: list[list[int]],
    expected_growing: list[Greedy],
) -> None:
    preempting = "preempting" in mode
    with Deployment(*MODES[mode], "--max-model-len", "1024") as deployment, ThreadPoolExecutor(1) as pool:
        fields: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
        greedy: dict[str, Any] = {"temperature": 0, "logprobs": 1, **fields}
        beside = pool.submit(deployment.complete_all, growing if preempting else [], max_tokens=LONG_TOKENS, **greedy)
        answers = deployment.complete_all(prompts, max_tokens=MAX_TOKENS, **greedy) + beside.result()
        sampled = deployment.complete_all(
            prompts[:6], max_tokens=MAX_TOKENS, temperature=0.9, top_p=0.95, seed=1234, **fields
        )
        preemptions = deployment.total("baton_preemptions_total")
        pulled = deployment.total("baton_tokens_total", 'source="pulled"')
        deployment.wait_idle()
    told = [*expected, *expected_growing][: len(answers)]
    worst = max(compare(index, *pair) for index, pair in enumerate(zip(answers, told, strict=True)))
    print(f"{mode}: largest logprob difference {worst:.2e}, {preemptions:.0f} preemptions")
    assert worst < 1e-3
    assert preempting == (preemptions > 0)
    assert ("unified" in mode) == (pulled == 0)
    SAMPLED[mode] = [answer["choices"][0]["token_ids"] for answer in sampled]
    first = next(iter(SAMPLED))
    assert SAMPLED[mode] == SAMPLED[first], f"seeded samples of {mode} differ from those of {first}"


def compare(index: int, answer: dict[str, Any], reference: Greedy) -> float:
    """Largest logprob difference up to the end, or to a tie in the reference that went the other way."""
    choice = answer["choices"][0]
    assert len(choice["token_ids"]) == len(reference.tokens), json.dumps(choice)
    worst = 0.0
    rows = zip(choice["token_ids"], choice["logprobs"]["token_logprobs"], strict=True)
    for position, (token, logprob) in enumerate(rows):
        if token != reference.tokens[position]:
            margin = reference.margins[position]
            assert margin < TIE, f"prompt {index}, output {position}: {token}, expected {reference.tokens[position]}"
            print(f"prompt {index}, output {position}: a tie, the reference's best logits are {margin:.1e} apart")
            break
        worst = max(worst, abs(logprob - reference.logprobs[position]))
    return worst
