"""Tool calls and reasoning as the openai client sees them, over whole deployments of the demo model."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from support.deployment import Deployment

pytestmark = pytest.mark.slow

MESSAGES: list[Any] = [{"role": "user", "content": "What is the weather in Cologne for the next three days?"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather of a city.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Cologne", "Bonn"]}, "when": {"$ref": "#/$defs/day"}},
                "required": ["city", "when"],
                "additionalProperties": False,
                "$defs": {"day": {"type": "integer", "minimum": 1, "maximum": 31}},
            },
        },
    },
    {"type": "function", "function": {"name": "time"}},
]


@pytest.fixture(scope="module")
def plain() -> Iterator[openai.OpenAI]:
    """A server without any flag for tools."""
    with (
        Deployment("--prefill", "1", "--decode", "1", "--max-model-len", "1024") as deployment,
        client(deployment) as c,
    ):
        yield c


@pytest.fixture(scope="module")
def auto() -> Iterator[openai.OpenAI]:
    words = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
    with Deployment(*words, "--unified", "1", "--max-model-len", "1024") as deployment, client(deployment) as c:
        yield c


def client(deployment: Deployment) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{deployment.url}/v1", api_key="none", max_retries=0)


def chat(c: openai.OpenAI, **fields: Any) -> Any:
    fields = {"seed": 1, **fields}
    return c.chat.completions.create(model="demo", messages=MESSAGES, max_tokens=300, temperature=1.0, **fields)


def streamed(chunks: Any) -> tuple[dict[int, list[str]], str, str, str]:
    """Calls as index -> [id, name, arguments], content, reasoning, finish reason."""
    calls: dict[int, list[str]] = {}
    text, thought, reason = "", "", ""
    for chunk in chunks:
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        thought += getattr(choice.delta, "reasoning", None) or ""
        reason = choice.finish_reason or reason
        for part in choice.delta.tool_calls or []:
            if part.index not in calls:
                calls[part.index] = [part.id, part.function.name, ""]
            calls[part.index][2] += part.function.arguments
    return calls, text, thought, reason


def check_arguments(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    if name == "weather":
        assert given["city"] in ("Cologne", "Bonn")
        assert 1 <= given["when"] <= 31
    else:
        assert (name, given) == ("time", {})


def test_a_required_tool_is_called_and_needs_no_flag(plain: openai.OpenAI) -> None:
    done = chat(plain, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, n=4)
    for choice in done.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        (call,) = choice.message.tool_calls
        assert call.type == "function"
        assert call.id
        check_arguments(call.function.name, call.function.arguments)


def test_required_calls_stream_as_deltas(plain: openai.OpenAI) -> None:
    calls, text, _, reason = streamed(chat(plain, tools=TOOLS, tool_choice="required", stream=True, seed=4))
    assert (text, reason) == ("", "tool_calls")
    assert sorted(calls) == list(range(len(calls)))
    assert len({id for id, _, _ in calls.values()}) == len(calls) > 0
    for _, name, arguments in calls.values():
        check_arguments(name, arguments)
    whole = chat(plain, tools=TOOLS, tool_choice="required", seed=4).choices[0].message.tool_calls
    assert [[call.function.name, call.function.arguments] for call in whole] == [c[1:] for c in calls.values()]


def test_a_named_tool_is_called(plain: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    done = chat(plain, tools=TOOLS, tool_choice=choice).choices[0]
    assert done.finish_reason == "stop"
    (call,) = done.message.tool_calls
    check_arguments("weather", call.function.arguments)
    calls, text, _, reason = streamed(chat(plain, tools=TOOLS, tool_choice=choice, stream=True))
    assert (text, reason, len(calls)) == ("", "stop", 1)
    check_arguments(calls[0][1], calls[0][2])


def test_no_tool_is_called_with_none(plain: openai.OpenAI) -> None:
    done = chat(plain, tools=TOOLS, tool_choice="none").choices[0]
    assert done.message.tool_calls is None
    assert done.message.content


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tools": TOOLS}, "--enable-auto-tool-choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "nobody"}}}, "nobody"),
        ({"tool_choice": "required"}, "needs tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "not",
        ),
    ],
)
def test_what_can_not_be_is_a_400(plain: openai.OpenAI, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        chat(plain, **fields)


def test_auto_finds_calls_and_reasoning_in_what_the_model_writes(auto: openai.OpenAI) -> None:
    """The demo model is no caller of tools: a grammar has it write what a Qwen would."""
    written = r'Let me see\. <tool_call>\{"name": "time", "arguments": \{\}\}</tool_call>'
    grammar = {"structured_outputs": {"regex": written}}
    answer = chat(auto, tools=TOOLS, seed=1, extra_body=grammar)
    message = answer.choices[0].message
    calls, text, thought, reason = streamed(chat(auto, tools=TOOLS, seed=1, extra_body=grammar, stream=True))
    assert [(name, arguments) for _, name, arguments in calls.values()] == [("time", "{}")]
    assert reason == "tool_calls"
    assert text == message.content == "Let me see. "
    assert [call.function.name for call in message.tool_calls] == ["time"]
    assert thought == (getattr(message, "reasoning", None) or "")
    assert (answer.usage.completion_tokens_details.reasoning_tokens > 0) == bool(thought)


def test_history_with_calls_reaches_the_template(auto: openai.OpenAI) -> None:
    messages: list[Any] = [
        *MESSAGES,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "Rain."},
    ]
    done = auto.chat.completions.create(model="demo", messages=messages, tools=TOOLS, max_tokens=10)
    assert done.choices[0].finish_reason in ("stop", "length")
