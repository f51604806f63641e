"""The `anthropic` package, whose key comes as x-api-key. tests/integration/test_messages_api.py looks closer."""

from collections.abc import Iterator
from typing import Any

import anthropic
import pytest

ASKS: dict[str, Any] = {
    "model": "demo",
    "max_tokens": 24,
    "system": "Answer in one sentence.",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "extra_body": {"temperature": 0},
}


@pytest.fixture
def client(url: str, key: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=url, api_key=key, max_retries=0, timeout=120) as client:
        yield client


def test_a_message_streamed_and_not(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASKS)
    assert whole.content[0].type == "text"
    assert "Paris" in whole.content[0].text
    with client.messages.stream(**ASKS) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    asks = {name: ASKS[name] for name in ("model", "system", "messages")}
    usage = client.messages.create(**ASKS).usage
    assert client.messages.count_tokens(**asks).input_tokens == usage.input_tokens + (
        usage.cache_read_input_tokens or 0
    )


def test_errors_are_of_anthropics_types(url: str, client: anthropic.Anthropic) -> None:
    stranger = anthropic.Anthropic(base_url=url, api_key="wrong", max_retries=0)
    with stranger, pytest.raises(anthropic.AuthenticationError, match="valid API key"):
        stranger.messages.create(**ASKS)
    with pytest.raises(anthropic.NotFoundError, match="other"):
        client.messages.create(**{**ASKS, "model": "other"})
    with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
        client.messages.create(**{**ASKS, "max_tokens": 0})
