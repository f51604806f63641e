"""Structured output over whole deployments: random schemas on the demo model, and streams whose workers die."""

import json
import os
import random
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai
import pytest
from support.deployment import Deployment
from support.schemas import random_schema

pytestmark = pytest.mark.slow

NUM_SCHEMAS = 200
COLOURS = {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 25, "maxItems": 25}
DENSE = {"json": COLOURS, "disable_any_whitespace": True}
"""What a model with random weights comes to the end of, too."""


@pytest.fixture(scope="module")
def demo() -> Iterator[Deployment]:
    with Deployment("--prefill", "1", "--decode", "1", "--max-model-len", "1024") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> Iterator[Deployment]:
    words = ("--load-format", "dummy", "--num-blocks", "300", "--served-model-name", "tiny")
    with Deployment(*words, "--prefill", "1", "--decode", "1", model=str(tiny_model)) as deployment:
        yield deployment


def as_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


@pytest.mark.timeout(1500)
def test_outputs_of_random_schemas_validate(demo: Deployment) -> None:
    rng = random.Random(os.urandom(8))
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]

    def answer(schema: dict[str, Any]) -> dict[str, Any]:
        fields = {"temperature": 1.0, "max_tokens": 300, "response_format": as_format(schema)}
        messages = [{"role": "user", "content": "Make up some data."}]
        response = demo.client.post("/v1/chat/completions", json={"messages": messages, **fields}, timeout=1200)
        assert response.status_code == 200, (schema, response.text)
        return response.json()["choices"][0]

    with ThreadPoolExecutor(32) as pool:
        choices = list(pool.map(answer, schemas))
    complete = 0
    for schema, choice in zip(schemas, choices, strict=True):
        if choice["finish_reason"] != "stop":
            assert choice["finish_reason"] == "length"
            continue
        complete += 1
        text = choice["message"]["content"]
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert complete > NUM_SCHEMAS / 2
    demo.wait_idle()


def test_every_kind_of_form_through_the_openai_client(demo: Deployment) -> None:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        for outputs, pattern in [
            ({"choice": ["yes", "no"]}, "yes|no"),
            ({"regex": "[a-f]{3,5}"}, "[a-f]{3,5}"),
            ({"grammar": 'root ::= "x" [0-9] [0-9]?'}, r"x\d\d?"),
        ]:
            done = client.completions.create(
                model="demo", prompt="Say:", max_tokens=20, extra_body={"structured_outputs": outputs}, n=4
            )
            assert all(re.fullmatch(pattern, choice.text) for choice in done.choices), outputs
            assert {choice.finish_reason for choice in done.choices} == {"stop"}
        stream = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": "Colours!"}],
            response_format={"type": "json_schema", "json_schema": {"name": "colours", "schema": COLOURS}},
            logprobs=True,
            stream=True,
            seed=1,
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        assert len(json.loads(text)) == 25


def test_constrained_and_free_streams_share_steps(tiny: Deployment) -> None:
    prompt = list(range(20, 60))
    free = {"max_tokens": 60, "seed": 3, "ignore_eos": True, "return_token_ids": True}
    alone = tiny.complete(prompt, **free)["choices"][0]["token_ids"]
    with ThreadPoolExecutor(6) as pool:
        fields = {"max_tokens": 400, "structured_outputs": DENSE, "min_tokens": 30, "logit_bias": {"50": 2}}
        constrained = [pool.submit(tiny.complete, prompt, **fields, presence_penalty=1.0) for _ in range(5)]
        assert tiny.complete(prompt, **free)["choices"][0]["token_ids"] == alone
        for future in constrained:
            choice = future.result()["choices"][0]
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["text"]), COLOURS)


def test_a_constrained_stream_survives_preemption(tiny_model: Path) -> None:
    words = ("--load-format", "dummy", "--unified", "1", "--num-blocks", "16", "--max-model-len", "256")
    with Deployment(*words, model=str(tiny_model)) as deployment:
        prompts = [list(range(20 + n, 36 + n)) for n in range(4)]
        answers = deployment.complete_all(prompts, max_tokens=230, structured_outputs=DENSE, seed=1)
        assert deployment.total("baton_preemptions_total") > 0
    for answer in answers:
        jsonschema.validate(json.loads(answer["choices"][0]["text"]), COLOURS)


@pytest.mark.parametrize("victim", ["prefill-0", "decode-0"])
def test_a_constrained_stream_survives_the_death_of_a_worker(tiny: Deployment, victim: str) -> None:
    fields = {"prompt": "Colours: ", "max_tokens": 400, "seed": 5, "structured_outputs": DENSE}
    undisturbed = tiny.client.post("/v1/completions", json=fields).json()["choices"][0]["text"]
    jsonschema.validate(json.loads(undisturbed), COLOURS)
    with tiny.client.stream("POST", "/v1/completions", json={**fields, "stream": True}) as response:
        lines = (line.removeprefix("data: ") for line in response.iter_lines() if line)
        text = json.loads(next(lines))["choices"][0]["text"]
        os.kill(tiny.pids()[victim], signal.SIGKILL)
        text += "".join(json.loads(line)["choices"][0]["text"] for line in lines if line != "[DONE]")
    assert text == undisturbed
    tiny.wait_for(f"{victim} is ready again")


def test_a_schema_that_can_not_be_enforced_is_a_400_that_names_the_keyword(tiny: Deployment) -> None:
    schema = {"type": "array", "uniqueItems": True}
    fields = {"prompt": "x", "response_format": as_format(schema)}
    response: httpx.Response = tiny.client.post("/v1/completions", json=fields)
    assert response.status_code == 400
    assert "uniqueItems" in response.json()["error"]["message"]
