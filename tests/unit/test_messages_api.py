"""/v1/messages without a cluster: requests in, events and errors out."""

import json
from typing import Any

import msgspec
import pytest

from baton.frontend.api.choice import Delta
from baton.frontend.api.errors import ApiError, bad_request, unavailable
from baton.frontend.api.messages import objects
from baton.frontend.api.messages.answer import MessageAnswer
from baton.frontend.api.messages.errors import encode_error
from baton.frontend.api.messages.requests import CountTokensRequest, MessagesRequest
from baton.frontend.api.messages.translate import in_our_names, to_chat
from baton.frontend.api.requests import ChatCompletionRequest, parse, read
from baton.frontend.tools.events import Content, Reasoning
from baton.frontend.tools.output import CallPart

TOOL = {"name": "time", "description": "Now.", "input_schema": {"type": "object"}}


def chat_of(**fields: Any) -> dict[str, Any]:
    """The chat request's body, which must be one."""
    body = {"max_tokens": 9, "messages": [{"role": "user", "content": "hi"}], **fields}
    wanted, raw, unknown = parse(json.dumps(body).encode(), MessagesRequest)
    assert unknown == []
    chat = to_chat(wanted, raw)
    assert read(chat, ChatCompletionRequest)[1] == []
    return chat


def test_what_both_apis_have_stays_and_the_rest_gets_its_chat_name() -> None:
    chat = chat_of(
        model="m",
        system=[{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}],
        temperature=0.3,
        top_k=4,
        seed=5,
        stop_sequences=["x"],
        metadata={"user_id": "me"},
        output_config={"effort": "low", "format": {"type": "json_schema", "schema": {"type": "object"}}},
    )
    assert chat == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be\nbrief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 9,
        "temperature": 0.3,
        "top_k": 4,
        "seed": 5,
        "stop": ["x"],
        "chat_template_kwargs": {"reasoning_effort": "low"},
        "response_format": {"type": "json_schema", "json_schema": {"name": "output", "schema": {"type": "object"}}},
    }


def test_log_probabilities_have_no_place_in_a_message() -> None:
    with pytest.raises(ApiError, match="logprob_token_ids"):
        chat_of(logprob_token_ids=[1])


@pytest.mark.parametrize("field", ["container", "mcp_servers", "output_format", "n", "echo"])
def test_what_would_be_ignored_in_silence_is_refused(field: str) -> None:
    with pytest.raises(ApiError, match=f"`{field}` is not supported"):
        chat_of(**{field: 7})
    chat_of(**{field: None})


def test_blocks_become_chat_messages() -> None:
    use = {"type": "tool_use", "id": "c", "name": "time", "input": {"zone": "CET"}}
    turns = [
        {"role": "user", "content": "When?"},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "See:", "cache_control": {"type": "ephemeral"}},
                use,
                {**use, "id": "d", "input": {}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "So?"},
                {"type": "tool_result", "tool_use_id": "c", "content": "Noon."},
                {"type": "tool_result", "tool_use_id": "d", "is_error": True},
                {"type": "text", "text": "And?"},
            ],
        },
    ]
    assert chat_of(messages=turns)["messages"] == [
        {"role": "user", "content": "When?"},
        {
            "role": "assistant",
            "content": "See:",
            "reasoning": "hm",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c", "type": "function", "function": {"name": "time", "arguments": '{"zone":"CET"}'}},
                {"id": "d", "type": "function", "function": {"name": "time", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "Noon."},
        {"role": "tool", "tool_call_id": "d", "content": ""},
        {"role": "user", "content": [{"type": "text", "text": "So?"}, {"type": "text", "text": "And?"}]},
    ]


@pytest.mark.parametrize(
    ("choice", "expected", "parallel"),
    [
        ({"type": "auto"}, "auto", True),
        ({"type": "any", "disable_parallel_tool_use": True}, "required", False),
        ({"type": "none"}, "none", True),
        ({"type": "tool", "name": "time"}, {"type": "function", "function": {"name": "time"}}, True),
    ],
)
def test_tool_choices_have_other_names(choice: Any, expected: Any, parallel: bool) -> None:
    chat = chat_of(tools=[TOOL], tool_choice=choice)
    function = {"name": "time", "description": "Now.", "parameters": {"type": "object"}}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert (chat["tool_choice"], chat["parallel_tool_calls"]) == (expected, parallel)


def test_messages_of_one_role_in_a_row_are_one_turn() -> None:
    said = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "c"},
        {"role": "assistant", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": "e"},
    ]
    assert chat_of(messages=said)["messages"] == [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": "cd"},
        {"role": "user", "content": "e"},
    ]
    said[1]["content"] = [{"type": "image"}]
    with pytest.raises(ApiError, match=r"messages\[1\]\.content\[0\]"):
        chat_of(messages=said)


@pytest.mark.parametrize(
    ("thinking", "template", "shown"),
    [
        ({"type": "enabled", "budget_tokens": 2000}, True, True),
        ({"type": "adaptive", "display": "omitted"}, True, False),
        ({"type": "disabled"}, False, False),
    ],
)
def test_thinking_is_the_templates_choice(thinking: Any, template: bool, shown: bool) -> None:
    chat = chat_of(thinking=thinking)
    assert chat["chat_template_kwargs"] == {"enable_thinking": template}
    assert chat["include_reasoning"] is shown


def test_an_answer_may_have_been_begun() -> None:
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": [{"type": "text", "text": "Once"}]}]
    chat = chat_of(messages=turns)
    assert (chat["continue_final_message"], chat["add_generation_prompt"]) == (True, False)
    turns[-1]["content"] = [{"type": "tool_use", "id": "c", "name": "time", "input": {}}]
    with pytest.raises(ApiError, match="tool_result"):
        chat_of(messages=turns)


def test_counting_takes_the_same_conversation() -> None:
    body = {"messages": [{"role": "user", "content": "hi"}], "system": "Be brief.", "tools": [TOOL]}
    wanted, raw, unknown = parse(json.dumps(body).encode(), CountTokensRequest)
    assert unknown == []
    chat = to_chat(wanted, raw)
    assert chat["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [tool["function"]["name"] for tool in chat["tools"]] == ["time"]


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "not_found_error"),
        (405, "invalid_request_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (500, "api_error"),
        (503, "overloaded_error"),
        (504, "timeout_error"),
    ],
)
def test_errors_have_anthropics_shape(status: int, kind: str) -> None:
    told = json.loads(encode_error(ApiError(status, "why")))
    assert told == {"type": "error", "error": {"type": kind, "message": "why"}}


def test_errors_name_the_fields_of_this_api() -> None:
    told = in_our_names(bad_request("max_completion_tokens must be at least 1, got 0.", "max_completion_tokens"))
    assert told.body.error.message == "max_tokens must be at least 1, got 0."


class Counts:
    """What an answer asks of a choice."""

    class prompt:  # noqa: N801
        ids = (1, 2, 3)

    num_tokens, cached_tokens, reasoning_tokens = 9, 2, 4


COUNTS: Any = Counts()


def answered(delta: Delta, fills_context: bool = False) -> tuple[list[Any], objects.Message]:
    answer = MessageAnswer("m", 3, fills_context, with_ledger=False)
    return answer.take(delta) + answer.finish(delta, COUNTS), answer.message


def test_events_add_up_to_the_message() -> None:
    pieces = [Reasoning("hm"), Content("See."), CallPart(0, '{"a": ', "time", "c"), CallPart(0, "1}")]
    events, message = answered(Delta(pieces=[*pieces], finish_reason="tool_calls"))
    assert [event.__struct_config__.tag for event in events] == [
        "message_start",
        *["content_block_start", "content_block_delta", "content_block_stop"] * 2,
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert message.content == [
        objects.ThinkingBlock("hm"),
        objects.TextBlock("See."),
        objects.ToolUseBlock("c", "time", {"a": 1}),
    ]
    assert message.stop_reason == events[-2].delta.stop_reason == "tool_use"
    assert events[0].message.content == [], "an earlier event does not change"
    assert events[0].message.usage.input_tokens == 3
    assert message.usage == events[-2].usage
    assert msgspec.to_builtins(message.usage) == {
        "input_tokens": 1,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 2,
        "output_tokens": 9,
        "output_tokens_details": {"thinking_tokens": 4},
    }


@pytest.mark.parametrize(
    ("delta", "fills_context", "reason", "sequence"),
    [
        (Delta("a", finish_reason="stop"), False, "end_turn", None),
        (Delta("a", finish_reason="stop", stop_reason="END"), False, "stop_sequence", "END"),
        (Delta("a", finish_reason="stop", stop_reason=7), False, "end_turn", None),
        (Delta("a", finish_reason="length"), False, "max_tokens", None),
        (Delta("a", finish_reason="length"), True, "model_context_window_exceeded", None),
        (Delta(pieces=[CallPart(0, "{}", "time", "c")], finish_reason="stop"), False, "tool_use", None),
    ],
)
def test_why_a_message_ends(delta: Delta, fills_context: bool, reason: str, sequence: str | None) -> None:
    _, message = answered(delta, fills_context)
    assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


def test_input_that_was_cut_off_is_empty() -> None:
    _, message = answered(Delta(pieces=[CallPart(0, '{"a": ', "time", "c")], finish_reason="length"))
    assert message.content == [objects.ToolUseBlock("c", "time", {})]
    assert message.stop_reason == "max_tokens"


def test_a_late_failure_is_an_event() -> None:
    answer = MessageAnswer("m", 3, False, with_ledger=False)
    answer.take(Delta("a"))
    (event,) = answer.fail(unavailable("gone"))
    assert json.loads(msgspec.json.encode(event))["error"] == {"type": "overloaded_error", "message": "gone"}
