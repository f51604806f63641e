"""/v1/messages as the anthropic client sees it, over a whole deployment of the demo model."""

import json
import re
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pydantic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from support.deployment import Deployment

pytestmark = pytest.mark.slow

KEY = "a-long-enough-key"
FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--api-key", KEY)
QUESTION: list[Any] = [{"role": "user", "content": "What is the weather in Cologne?"}]
TOOLS: list[Any] = [
    {
        "name": "weather",
        "description": "The weather of a city.",
        "input_schema": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Cologne", "Bonn"]},
                "day": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "day"],
            "additionalProperties": False,
        },
    },
    {"name": "time", "input_schema": {"type": "object", "properties": {}, "additionalProperties": False}},
]
WRITTEN = r'<think>I must\nlook\.</think>\n\nLet me see\. <tool_call>\{"name": "time", "arguments": \{\}\}</tool_call>'
"""What a model that reasons and uses tools writes; the demo model needs a grammar for it."""
EVENTS: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(RawMessageStreamEvent)


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    with Deployment(*FLAGS, "--prefill", "1", "--decode", "1", "--max-model-len", "512") as deployment:
        deployment.client.headers["x-api-key"] = KEY
        yield deployment


@pytest.fixture(scope="module")
def client(served: Deployment) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key=KEY, max_retries=0) as client:
        yield client


def asked(fields: dict[str, Any]) -> dict[str, Any]:
    """A request, greedy unless it says otherwise: what a model with little sense samples may be anything.

    The current client has no parameter for the temperature any more.
    """
    body = {"temperature": 0, **fields.pop("extra_body", {})}
    return {"model": "demo", "messages": QUESTION, "max_tokens": 40, **fields, "extra_body": body}


def create(client: anthropic.Anthropic, **fields: Any) -> Message:
    """A whole message, checked against the client's types."""
    message = client.messages.create(**asked(fields))
    return Message.model_validate(message.to_dict())


def streamed(client: anthropic.Anthropic, **fields: Any) -> tuple[list[Any], Message]:
    """The events of a streamed message, each checked against the client's types, and what the client makes of them."""
    fields = asked(fields)
    raw = [EVENTS.validate_python(event.to_dict()) for event in client.messages.create(**fields, stream=True)]
    with client.messages.stream(**fields) as stream:
        final = stream.get_final_message()
    return raw, Message.model_validate(final.to_dict())


def kinds(events: list[Any]) -> list[str]:
    """The types of events, each run of equal ones once."""
    found = [event.type for event in events]
    return [kind for index, kind in enumerate(found) if index == 0 or kind != found[index - 1]]


def said(message: Message) -> dict[str, Any]:
    """What two messages for the same request have in common."""
    fields = message.to_dict()
    del fields["id"]
    fields["usage"] = {  # the second one finds more in the cache
        "in": message.usage.input_tokens + (message.usage.cache_read_input_tokens or 0),
        "out": message.usage.output_tokens,
        "thinking": message.usage.output_tokens_details,
    }
    for block in fields["content"]:  # type: ignore[attr-defined]
        block.pop("id", None)
    return fields


def text_of(message: Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def chat(served: Deployment, messages: list[Any], **fields: Any) -> dict[str, Any]:
    answer = served.client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 40, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_a_message_says_what_a_chat_completion_says(served: Deployment, client: anthropic.Anthropic) -> None:
    system: list[Any] = [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}]
    message = create(client, system=system, metadata={"user_id": "me"})
    other = chat(served, [{"role": "system", "content": "Be brief."}, *QUESTION], temperature=0)
    assert text_of(message) == other["choices"][0]["message"]["content"]
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == other["usage"]["prompt_tokens"]
    assert usage.output_tokens == other["usage"]["completion_tokens"]
    again = create(client, system=system)
    assert (again.usage.cache_read_input_tokens or 0) >= 16, "what came from the prefix cache is counted apart"


def test_text_comes_in_events_that_add_up_to_the_whole(client: anthropic.Anthropic) -> None:
    fields = {"extra_body": {"temperature": 1.0, "seed": 3, "structured_outputs": {"regex": "[a-z ]{40}"}}}
    whole = create(client, **fields)
    events, final = streamed(client, **fields)
    assert kinds(events) == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert sum(event.type == "content_block_delta" for event in events) > 3
    assert said(final) == said(whole)
    assert whole.stop_reason == "end_turn"


def test_thinking_text_and_tools_come_in_the_order_in_which_they_were_written(client: anthropic.Anthropic) -> None:
    fields = {"tools": TOOLS, "max_tokens": 200, "extra_body": {"structured_outputs": {"regex": WRITTEN}, "seed": 1}}
    whole = create(client, **fields)
    thinking, text, use = whole.content
    assert (thinking.type, text.type, use.type) == ("thinking", "text", "tool_use")
    assert thinking.thinking == "I must\nlook."  # type: ignore[union-attr]
    assert text.text == "Let me see. "  # type: ignore[union-attr]
    assert (use.name, use.input) == ("time", {})  # type: ignore[union-attr]
    assert whole.stop_reason == "tool_use"
    assert whole.usage.output_tokens_details is not None
    assert 0 < whole.usage.output_tokens_details.thinking_tokens < whole.usage.output_tokens
    _, final = streamed(client, **fields)
    assert said(final) == said(whole)
    hidden = create(client, **fields, thinking={"type": "adaptive", "display": "omitted"})
    assert [block.type for block in hidden.content] == ["text", "tool_use"]


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]
)
def test_a_tool_that_must_be_used_is_enforced(client: anthropic.Anthropic, choice: Any) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "max_tokens": 300}
    for message in (create(client, **fields), streamed(client, **fields)[1]):
        (use,) = [block for block in message.content if block.type == "tool_use"]
        assert message.stop_reason == "tool_use"
        if use.name == "weather":
            assert use.input["city"] in ("Cologne", "Bonn")
            assert use.input["day"] in range(1, 10)
        else:
            assert (use.name, use.input) == ("time", {})


def test_no_tool_is_used_with_none(client: anthropic.Anthropic) -> None:
    message = create(client, tools=TOOLS, tool_choice={"type": "none"})
    assert [block.type for block in message.content] == ["text"]


def test_tools_are_used_and_their_results_given_back(served: Deployment, client: anthropic.Anthropic) -> None:
    first = create(client, tools=TOOLS, tool_choice={"type": "tool", "name": "weather"}, max_tokens=200)
    (use,) = [block for block in first.content if block.type == "tool_use"]
    result: Any = {"type": "tool_result", "tool_use_id": use.id, "content": [{"type": "text", "text": "Rain."}]}
    turns = [*QUESTION, first.to_param(), {"role": "user", "content": [result, {"type": "text", "text": "And?"}]}]
    second = create(client, messages=turns, tools=TOOLS)
    call = {"id": use.id, "type": "function", "function": {"name": use.name, "arguments": json.dumps(use.input)}}
    others = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": use.id, "content": "Rain."},
        {"role": "user", "content": "And?"},
    ]
    tools = [
        {"type": "function", "function": {"name": tool["name"], "parameters": tool["input_schema"]}} for tool in TOOLS
    ]
    other = chat(served, others, tools=tools, temperature=0)
    assert text_of(second) == other["choices"][0]["message"]["content"]


def test_an_answer_goes_on_where_the_assistant_has_begun(served: Deployment, client: anthropic.Anthropic) -> None:
    begun = [*QUESTION, {"role": "assistant", "content": "The weather in Cologne is"}]
    fields = {"continue_final_message": True, "add_generation_prompt": False, "temperature": 0}
    other = chat(served, begun, **fields)["choices"][0]["message"]["content"]
    assert text_of(create(client, messages=begun)) == other


def test_what_ends_a_message_is_told(client: anthropic.Anthropic) -> None:
    text = text_of(create(client))
    stop = text[len(text) // 2 :][:4]
    stopped = create(client, stop_sequences=[stop])
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", stop)
    assert text_of(stopped) == text[: text.index(stop)]
    endless = {"extra_body": {"ignore_eos": True}}
    cut = create(client, max_tokens=5, **endless)
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 5)
    full = create(client, max_tokens=20_000, **endless)
    assert full.stop_reason == "model_context_window_exceeded"
    assert full.usage.output_tokens + full.usage.input_tokens + (full.usage.cache_read_input_tokens or 0) == 512


def test_the_text_is_held_to_a_schema(client: anthropic.Anthropic) -> None:
    schema: Any = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0, "maximum": 99}}}
    schema |= {"required": ["age"], "additionalProperties": False}
    message = create(client, output_config={"format": {"type": "json_schema", "schema": schema}}, max_tokens=200)
    assert json.loads(text_of(message))["age"] in range(100)


def test_tokens_are_counted(client: anthropic.Anthropic) -> None:
    fields: Any = {"model": "demo", "messages": QUESTION, "system": "Be brief.", "tools": TOOLS}
    usage = create(client, **fields).usage
    counted = client.messages.count_tokens(**fields).input_tokens
    assert counted == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_client_that_leaves_frees_everything(served: Deployment, client: anthropic.Anthropic) -> None:
    before = served.total("baton_requests_total", 'outcome="aborted"')
    fields: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 400, "extra_body": {"ignore_eos": True}}
    with client.messages.create(**fields, stream=True) as stream:
        next(iter(stream))
    served.wait_idle()
    assert served.total("baton_requests_total", 'outcome="aborted"') == before + 1


def test_the_ledger_is_told_for_the_asking(served: Deployment) -> None:
    body = {"messages": QUESTION, "max_tokens": 5}
    answer = served.client.post("/v1/messages", json=body, headers={"x-baton-ledger": "1"}).json()
    assert (answer["baton_ledger"]["prefill_worker"], answer["baton_ledger"]["transport"]) == ("prefill-0", "shm")


def test_errors_are_the_clients_own(served: Deployment, client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.NotFoundError, match="not_found_error") as refused:
        create(client, model="other")
    assert refused.value.request_id == refused.value.response.headers["x-request-id"]
    with (
        anthropic.Anthropic(base_url=served.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(anthropic.AuthenticationError, match="authentication_error"),
    ):
        create(stranger)
    with pytest.raises(anthropic.BadRequestError, match="maximum context length"):
        create(client, messages=[{"role": "user", "content": "word " * 5000}])
    for method, path, status in [("GET", "/v1/messages", 405), ("POST", "/v1/messages/batches", 404)]:
        answer = served.client.request(method, path)
        assert (answer.status_code, answer.json()["type"]) == (status, "error")
    large = served.client.post("/v1/messages", content=b" " * (16 * 2**20 + 1))
    assert (large.status_code, large.json()["error"]["type"]) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "must not be empty"),
        ({"messages": [{"role": "king", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
        ({"temperature": -1}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, r"tools\[0\]"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "nobody"}}, "nobody"),
        ({"tool_choice": {"type": "any"}}, "needs tools"),
        ({"thinking": {"type": "deep"}}, "thinking.type"),
        ({"stop_sequences": [""]}, "empty string"),
        ({"mcp_servers": [{"url": "x"}]}, "not supported"),
        (
            {"output_config": {"format": {"type": "json_schema", "schema": {"type": "array", "uniqueItems": True}}}},
            "uniqueItems",
        ),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(served: Deployment, fields: dict[str, Any], words: str) -> None:
    for stream in (False, True):
        body = {"messages": QUESTION, "max_tokens": 10, "stream": stream, **fields}
        answer: httpx.Response = served.client.post("/v1/messages", json=body)
        assert answer.status_code == 400, answer.text
        assert len(answer.content) < 2000
        envelope = answer.json()
        assert (envelope["type"], envelope["error"]["type"]) == ("error", "invalid_request_error")
        assert re.search(words, envelope["error"]["message"])
