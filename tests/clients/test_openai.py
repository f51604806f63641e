"""The `openai` package, current version."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

QUESTION: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 20},
        "people": {"type": "integer", "minimum": 0, "maximum": 10**8},
    },
    "required": ["city", "people"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Weather now", "parameters": SCHEMA}}


class City(BaseModel):
    city: str = Field(max_length=20)
    people: int = Field(ge=0, le=10**8)


@pytest.fixture
def client(url: str, key: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id).id == model.id == "demo"


def test_a_key_that_is_wrong(url: str) -> None:
    with (
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError, match="valid API key") as caught,
    ):
        client.models.list()
    assert caught.value.code == "invalid_api_key"


def test_chat_streamed_and_not(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "messages": QUESTION, "max_completion_tokens": 24, "temperature": 0}
    whole = client.chat.completions.create(**options)
    assert "Paris" in (whole.choices[0].message.content or "")
    with client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}) as stream:
        *chunks, last = stream
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_the_request_id_is_told(client: openai.OpenAI) -> None:
    answer = client.chat.completions.with_raw_response.create(
        model="demo", messages=QUESTION, max_tokens=1, extra_headers={"X-Request-Id": "mine"}
    )
    assert answer.request_id == "mine"
    assert answer.parse()._request_id == "mine"


def test_logprobs_and_samples(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=QUESTION, max_tokens=4, n=2, seed=7, logprobs=True, top_logprobs=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)


def test_a_parsed_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="demo", messages=QUESTION, response_format=City, max_tokens=200, temperature=0
    )
    assert isinstance(answer.choices[0].message.parsed, City)


def test_a_required_tool_streamed_and_not(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"model": "demo", "messages": QUESTION, "tools": [TOOL], "tool_choice": "required"}
    options |= {"max_tokens": 200, "temperature": 0}
    whole = client.chat.completions.create(**options)
    (call, *_) = whole.choices[0].message.tool_calls or []
    City.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(**options) as stream:
        final = stream.get_final_completion()
    (streamed, *_) = final.choices[0].message.tool_calls or []
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="demo", prompt=["The capital of France is", "One, two, three,"], max_tokens=5, temperature=0, logprobs=2
    )
    assert "Paris" in answer.choices[0].text
    assert "four" in answer.choices[1].text
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or []) == 5


def test_many_at_once(url: str, key: str) -> None:
    async def run() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0, timeout=120) as client:
            create = client.chat.completions.create
            work = (create(model="demo", messages=QUESTION, max_tokens=8, temperature=0) for _ in range(16))
            return [answer.choices[0].message.content for answer in await asyncio.gather(*work)]

    assert len(set(asyncio.run(run()))) == 1


def test_what_is_wrong_is_told(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.completions.create(model="other", prompt="a")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError, match="temperature") as hot:
        client.chat.completions.create(model="demo", messages=QUESTION, temperature=-1)
    assert hot.value.param == "temperature"


def test_embeddings(client: openai.OpenAI) -> None:
    texts = ["The sky is blue.", "The capital of France is Paris."]
    plain = client.embeddings.create(model="demo", input=texts, encoding_format="float")
    decoded = client.embeddings.create(model="demo", input=texts)  # asks for base64 by itself
    for one, other in zip(plain.data, decoded.data, strict=True):
        assert one.index == other.index
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
        assert sum(x * x for x in one.embedding) == pytest.approx(1, abs=1e-5)
    assert plain.usage.prompt_tokens == plain.usage.total_tokens > 0
    with pytest.raises(openai.BadRequestError, match="dimensions"):
        client.embeddings.create(model="demo", input=texts, dimensions=7)
