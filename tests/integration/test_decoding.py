"""Fields that reach the workers, on the real SmolLM2 in float32: what they do equals what transformers computes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from support.deployment import Deployment
from support.prompts import excerpts, library_tokens
from support.reference import Reference

from baton.frontend import LLM, BeamSearchParams, SamplingParams
from baton.proto.config import CacheConfig
from baton.worker.weights.resolve import resolve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

MODES = {
    "split": ["--prefill", "1", "--decode", "1", "--max-num-batched-tokens", "48"],
    "unified, preempting": ["--unified", "1", "--num-blocks", "40", "--max-model-len", "512"],
}
CHAT = [{"role": "user", "content": "What is 2+2?"}]


@pytest.fixture(scope="module")
def model_dir() -> Path:
    return resolve("demo")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


@pytest.fixture(scope="module")
def prompts(model_dir: Path) -> list[list[int]]:
    return excerpts(library_tokens(model_dir), [2, 17, 64, 150], seed=3)


@pytest.fixture(scope="module", params=MODES)
def served(request: pytest.FixtureRequest, model_dir: Path) -> Iterator[Deployment]:
    with Deployment("--dtype", "float32", *MODES[request.param], model=str(model_dir)) as deployment:
        yield deployment


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", dtype="float32", max_model_len=512, cache=CacheConfig(num_blocks=200)) as llm:
        yield llm


def check_prompt_logprobs(found: list[Any], prompt: list[int], expected: torch.Tensor, top: int) -> None:
    """`found` as the API writes it, against expected [len(prompt) - 1, vocab]."""
    assert found[0] is None
    for position, (entry, id) in enumerate(zip(found[1:], prompt[1:], strict=True)):
        row = expected[position]
        assert entry[str(id)]["logprob"] == pytest.approx(float(row[id]), abs=2e-3)
        values, ids = row.topk(top)
        best = sorted((e["logprob"] for key, e in entry.items() if e["rank"] <= top), reverse=True)
        assert best == pytest.approx(values.tolist(), abs=2e-3)
        assert len(set(map(str, ids.tolist())) & set(entry)) >= top - 1, "two may be as good as equal"


def test_prompt_logprobs_are_those_of_transformers_whatever_is_cached(
    served: Deployment, reference: Reference, prompts: list[list[int]]
) -> None:
    expected = [reference.prompt_logprobs(prompt) for prompt in prompts]
    for prompt in prompts:
        served.complete(prompt, max_tokens=1)
    fields = {"prompt_logprobs": 2, "max_tokens": 120, "ignore_eos": True, "temperature": 0}
    answers = served.complete_all(prompts * 2, **fields)
    for index, answer in enumerate(answers):
        found = answer["choices"][0]["prompt_logprobs"]
        check_prompt_logprobs(found, prompts[index % len(prompts)], expected[index % len(prompts)], top=2)
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    if "--num-blocks" in served.process.args:  # type: ignore[operator]
        assert served.total("baton_preemptions_total") > 0
    alone = served.complete(prompts[-1], prompt_logprobs=2, max_tokens=1)
    assert alone["choices"][0]["prompt_logprobs"] == answers[-1]["choices"][0]["prompt_logprobs"], "the same bits"
    served.wait_idle()


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_an_echo_tells_what_an_evaluation_harness_sums_up(
    served: Deployment, reference: Reference, prompts: list[list[int]], max_tokens: int
) -> None:
    """Nested token ids, as lm-eval's local-completions sends them."""
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    answer = served.client.post("/v1/completions", json=body).json()
    assert answer["usage"]["completion_tokens"] == max_tokens * len(prompts)
    for prompt, choice in zip(prompts, answer["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert {len(column) for column in logprobs.values()} == {len(prompt) + max_tokens}
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        expected = reference.prompt_logprobs(prompt)
        own = expected[range(len(prompt) - 1), prompt[1:]]
        assert logprobs["token_logprobs"][1 : len(prompt)] == pytest.approx(own.tolist(), abs=2e-3)
        best = [max(top.values()) for top in logprobs["top_logprobs"][1 : len(prompt)]]
        assert best == pytest.approx(expected.max(-1).values.tolist(), abs=2e-3)
        assert choice["finish_reason"] == "length"


def test_an_echo_may_be_streamed(served: Deployment, prompts: list[list[int]]) -> None:
    body = {"prompt": prompts[1], "echo": True, "logprobs": 1, "max_tokens": 4, "temperature": 0}
    whole = served.client.post("/v1/completions", json=body).json()["choices"][0]
    with served.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    chunks = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name, column in whole["logprobs"].items():
        assert [value for chunk in chunks for value in chunk["logprobs"][name]] == column


@pytest.mark.parametrize(("width", "length_penalty"), [(2, 1.0), (4, 0.0)])
def test_beams_over_http_are_those_of_transformers(
    served: Deployment, reference: Reference, prompts: list[list[int]], width: int, length_penalty: float
) -> None:
    fields = {"n": width, "use_beam_search": True, "length_penalty": length_penalty, "return_token_ids": True}
    for prompt in prompts[1:3]:
        answer = served.complete(prompt, max_tokens=12, **fields)
        found = [choice["token_ids"] for choice in answer["choices"]]
        assert found == reference.beams(prompt, width, 12, length_penalty)
    chat = {"messages": CHAT, "max_tokens": 16, **fields}
    answer = served.client.post("/v1/chat/completions", json=chat).json()
    found = [choice["token_ids"] for choice in answer["choices"]]
    assert found == reference.beams(answer["prompt_token_ids"], width, 16, length_penalty)
    assert [choice["finish_reason"] for choice in answer["choices"]] == [
        "stop" if len(tokens) < 16 else "length" for tokens in found
    ]
    served.wait_idle()


def test_beams_can_not_be_held_to_a_form(served: Deployment) -> None:
    body = {"messages": CHAT, "use_beam_search": True, "n": 2, "max_tokens": 4}
    refused = served.client.post("/v1/chat/completions", json={**body, "response_format": {"type": "json_object"}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "use_beam_search")
    free = served.client.post("/v1/chat/completions", json={**body, "response_format": {"type": "text"}})
    assert free.status_code == 200


def test_streamed_beams_say_the_same_with_the_openai_package(served: Deployment) -> None:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        options: dict[str, Any] = {"model": client.models.list().data[0].id, "messages": CHAT, "max_tokens": 8, "n": 2}
        extra = {"use_beam_search": True}
        whole = client.chat.completions.create(**options, extra_body=extra)
        texts = dict.fromkeys(range(2), "")
        for chunk in client.chat.completions.create(**options, stream=True, extra_body=extra):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
    assert list(texts.values()) == [choice.message.content for choice in whole.choices]


@pytest.mark.parametrize(("width", "length_penalty"), [(3, 1.0), (4, 2.0)])
def test_offline_beams_are_those_of_transformers(
    llm: LLM, reference: Reference, prompts: list[list[int]], width: int, length_penalty: float
) -> None:
    chosen = prompts[1:3]
    params = BeamSearchParams(beam_width=width, max_tokens=12, length_penalty=length_penalty)
    for prompt, output in zip(chosen, llm.beam_search(chosen, params), strict=True):
        found = [sequence.tokens[len(prompt) :] for sequence in output.sequences]
        assert found == reference.beams(prompt, width, 12, length_penalty)
        totals = [
            sum(e[t].logprob for e, t in zip(s.logprobs, f, strict=True))
            for s, f in zip(output.sequences, found, strict=True)
        ]
        assert [sequence.cum_logprob for sequence in output.sequences] == pytest.approx(totals)


def test_samples_compute_and_move_the_prompt_once(served: Deployment, prompts: list[list[int]]) -> None:
    prompt = [7, *prompts[3]]
    fields = {"max_tokens": 8, "seed": 5, "temperature": 1.0, "return_token_ids": True, "ignore_eos": True}
    body, headers = {"prompt": prompt, "n": 4, **fields}, {"x-baton-ledger": "1"}
    answer = served.client.post("/v1/completions", json=body, headers=headers).json()
    ledgers = answer["baton_ledger"]
    assert sorted(ledger.get("computed_tokens", 0) for ledger in ledgers) == [1, 1, 1, len(prompt)]
    if ledgers[0]["transport"] == "shm":
        assert sorted(ledger["moved_blocks"] for ledger in ledgers) == [1, 1, 1, -(-len(prompt) // 16)]
    samples = [choice["token_ids"] for choice in answer["choices"]]
    assert len(set(map(tuple, samples))) == 4
    assert served.complete(prompt, **fields)["choices"][0]["token_ids"] == samples[0]
    served.wait_idle()


def test_only_allowed_tokens_and_no_bad_words_come(served: Deployment, prompts: list[list[int]]) -> None:
    options = {"temperature": 0, "return_token_ids": True, "ignore_eos": True}
    greedy = served.complete(prompts[2], max_tokens=12, **options)["choices"][0]
    few = [greedy["token_ids"][0], 9, 10]
    allowed = served.complete(prompts[2], max_tokens=8, allowed_token_ids=few, **options)["choices"][0]
    assert set(allowed["token_ids"]) <= set(few)
    words = greedy["text"].split()
    assert words
    without = served.complete(prompts[2], max_tokens=12, bad_words=words[:2], **options)["choices"][0]
    assert not set(without["text"].split()) & set(words[:2])


def test_chosen_tokens_have_the_logprobs_of_transformers(
    served: Deployment, reference: Reference, prompts: list[list[int]]
) -> None:
    asked = [11, 500, 3]
    answer = served.complete(
        prompts[2],
        max_tokens=3,
        temperature=0,
        logprob_token_ids=asked,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
    )["choices"][0]
    expected = reference.logits(prompts[2], answer["token_ids"]).log_softmax(-1)
    for position, top in enumerate(answer["logprobs"]["top_logprobs"]):
        assert {f"token_id:{id}" for id in asked} <= set(top)
        for id in asked:
            assert top[f"token_id:{id}"] == pytest.approx(float(expected[position, id]), abs=2e-3)


def test_tenants_with_a_salt_share_no_cached_prompt(served: Deployment, prompts: list[list[int]]) -> None:
    prompt = [9, *prompts[3]]

    def cached(**fields: Any) -> int:
        return served.complete(prompt, max_tokens=1, **fields)["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 0, 0]
    assert cached(cache_salt="a") == cached() == len(prompt) // 16 * 16


def test_offline_prompt_logprobs_are_those_of_transformers(
    llm: LLM, reference: Reference, prompts: list[list[int]]
) -> None:
    outputs = llm.generate(prompts, SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=1))
    for prompt, output in zip(prompts, outputs, strict=True):
        found = output.prompt_logprobs
        assert found is not None
        own = reference.prompt_logprobs(prompt)[range(len(prompt) - 1), prompt[1:]]
        assert [entry[id].logprob for entry, id in zip(found[1:], prompt[1:], strict=True) if entry] == pytest.approx(
            own.tolist(), abs=2e-3
        )
