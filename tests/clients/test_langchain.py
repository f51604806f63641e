"""The package `langchain-openai`."""

from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, ConfigDict, Field

QUESTION = "What is the capital of France?"


class City(BaseModel):
    """A city."""

    model_config = ConfigDict(extra="forbid")
    city: str = Field(max_length=20)
    people: int = Field(ge=0, le=99_999_999)


@tool
def weather(city: str) -> str:
    """The weather of a city now."""
    return f"It rains in {city}."


@pytest.fixture
def options(url: str, key: str) -> dict[str, Any]:
    return {"base_url": f"{url}/v1", "api_key": key, "model": "demo", "temperature": 0, "max_retries": 0}


@pytest.fixture
def chat(options: dict[str, Any]) -> ChatOpenAI:
    return ChatOpenAI(**options, max_completion_tokens=150)


def test_invoke_and_stream_say_the_same(chat: ChatOpenAI) -> None:
    whole = chat.invoke(QUESTION)
    assert "Paris" in whole.text
    chunks = list(chat.stream(QUESTION, stream_usage=True))
    assert "".join(chunk.text for chunk in chunks) == whole.text
    usage = [chunk.usage_metadata for chunk in chunks if getattr(chunk, "usage_metadata", None)]
    assert [each["output_tokens"] for each in usage] == [whole.usage_metadata["output_tokens"]]


def test_batch(chat: ChatOpenAI) -> None:
    first, second = chat.batch([QUESTION, QUESTION])
    assert first.text == second.text


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(chat: ChatOpenAI, method: Any) -> None:
    answer = chat.with_structured_output(City, method=method).invoke("Invent a city.")
    assert isinstance(answer, City)


def test_a_tool_and_its_answer(chat: ChatOpenAI) -> None:
    asked = chat.bind_tools([weather], tool_choice="required", strict=True).invoke("How is the weather in Paris?")
    assert isinstance(asked, AIMessage)
    call = asked.tool_calls[0]
    assert set(call["args"]) == {"city"}
    result = ToolMessage(weather.invoke(call["args"]), tool_call_id=call["id"])
    answer = chat.bind_tools([weather]).invoke([HumanMessage("How is the weather in Paris?"), asked, result])
    assert answer.text or answer.tool_calls


def test_completions(options: dict[str, Any]) -> None:
    assert "Paris" in OpenAI(**options, max_tokens=5).invoke("The capital of France is")


def test_embeddings(url: str, key: str) -> None:
    """By default it would send the token ids of OpenAI's own models."""
    texts = ["The sky is blue.", "The capital of France is Paris."]
    options = {"base_url": f"{url}/v1", "api_key": key, "model": "demo", "max_retries": 0}
    embeddings = OpenAIEmbeddings(**options, check_embedding_ctx_length=False)
    first, second = embeddings.embed_documents(texts)
    assert embeddings.embed_query(texts[0]) == pytest.approx(first, abs=1e-6)
    assert first != pytest.approx(second, abs=1e-3)
