"""/v1/responses without a cluster: requests in, events out, and what is remembered."""

import asyncio
import json
from typing import Any

import msgspec
import pytest

from baton.frontend.api.blocks import Logprobs
from baton.frontend.api.choice import Delta
from baton.frontend.api.errors import ApiError, bad_request, unavailable
from baton.frontend.api.requests import ChatCompletionRequest, parse, read
from baton.frontend.api.responses import TokenLogprob, encode
from baton.frontend.api.responses_api import objects, translate
from baton.frontend.api.responses_api.answer import ResponseAnswer
from baton.frontend.api.responses_api.draft import new_response
from baton.frontend.api.responses_api.items import as_input, read_input, to_messages
from baton.frontend.api.responses_api.requests import InputItem, ResponsesRequest
from baton.frontend.api.responses_api.store import EventLog, Kept, Live, ResponseStore, new_response_id, owner_of
from baton.frontend.api.responses_api.window import Messages, fitting
from baton.frontend.model_info import ModelInfo, SamplingDefaults
from baton.frontend.tools.events import Content, Reasoning
from baton.frontend.tools.output import CallPart
from baton.proto.messages import SamplingParams, TokenLogprobs

INFO = ModelInfo(("m",), 1000, 300, (256,), SamplingDefaults())
ECHO = SamplingParams(max_tokens=1, seed=1, temperature=0.5, top_p=0.9)
TOOL = {"type": "function", "name": "time", "description": "Now.", "parameters": {"type": "object"}, "strict": True}


def request(**fields: Any) -> tuple[ResponsesRequest, dict[str, Any]]:
    wanted, raw, unknown = parse(json.dumps({"input": "hi", **fields}).encode(), ResponsesRequest)
    assert unknown == []
    return wanted, raw


def chat_of(**fields: Any) -> dict[str, Any]:
    """The chat request's body, which must be one."""
    wanted, raw = request(**fields)
    translate.check(wanted)
    chat = translate.to_chat(wanted, raw, read_input(wanted.input))
    assert read(chat, ChatCompletionRequest)[1] == []
    return chat


def messages_of(*items: dict[str, Any]) -> Messages:
    return to_messages(read_input(msgspec.convert(items, list[InputItem])))


def test_what_both_apis_have_stays_and_the_rest_gets_its_chat_name() -> None:
    chat = chat_of(
        model="m",
        instructions="Be brief.",
        max_output_tokens=7,
        temperature=0.3,
        seed=5,
        stop=["x"],
        structured_outputs={"regex": "a+"},
        parallel_tool_calls=False,
        include=["message.output_text.logprobs"],
        top_logprobs=3,
        reasoning={"effort": "low"},
        chat_template_kwargs={"mood": "good"},
        metadata={"a": "b"},
    )
    assert chat == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "max_completion_tokens": 7,
        "temperature": 0.3,
        "seed": 5,
        "stop": ["x"],
        "structured_outputs": {"regex": "a+"},
        "parallel_tool_calls": False,
        "logprobs": True,
        "top_logprobs": 3,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"mood": "good"},
    }


def test_tools_and_formats_get_their_chat_shape() -> None:
    chat = chat_of(
        tools=[TOOL, {**TOOL, "name": "other"}],
        tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "time"}]},
        text={"format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}},
    )
    function = {"name": "time", "description": "Now.", "parameters": {"type": "object"}}
    assert chat["tools"] == [{"type": "function", "function": function}]
    assert chat["tool_choice"] == "auto"
    schema = {"name": "n", "schema": {"type": "object"}, "strict": True}
    assert chat["response_format"] == {"type": "json_schema", "json_schema": schema}
    named = chat_of(tools=[TOOL], tool_choice={"type": "function", "name": "time"})["tool_choice"]
    assert named == {"type": "function", "function": {"name": "time"}}


def test_one_turn_of_the_assistant_is_one_message() -> None:
    call = {"type": "function_call", "call_id": "c", "name": "time", "arguments": "{}"}
    found = messages_of(
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "When?"}]},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "See:"}]},
        call,
        {**call, "call_id": "d"},
        {"role": "assistant", "content": " so."},
        {"type": "function_call_output", "call_id": "c", "output": "Noon."},
        {"type": "function_call_output", "call_id": "d", "output": [{"type": "input_text", "text": "Night."}]},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}]},
    )
    function = {"name": "time", "arguments": "{}"}
    assert found == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "When?"},
        {
            "role": "assistant",
            "content": "See: so.",
            "reasoning": "hm",
            "reasoning_content": "hm",
            "tool_calls": [{"id": id, "type": "function", "function": function} for id in ("c", "d")],
        },
        {"role": "tool", "tool_call_id": "c", "content": "Noon."},
        {"role": "tool", "tool_call_id": "d", "content": "Night."},
        {"role": "assistant", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]},
    ]


@pytest.mark.parametrize(
    ("item", "param"),
    [
        ({"type": "web_search_call"}, "input[0].type"),
        ({}, "input[0].type"),
        ({"role": "user"}, "input[0].content"),
        ({"role": "user", "content": [{"type": "input_file"}]}, "input[0].content[0]"),
        ({"type": "function_call", "call_id": "c", "name": "f"}, "input[0].arguments"),
        ({"type": "function_call_output", "output": "x"}, "input[0].call_id"),
    ],
)
def test_an_item_that_says_nothing_to_the_model_is_refused(item: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        messages_of(item)
    assert caught.value.body.error.param == param


@pytest.mark.parametrize(
    "field", ["n", "best_of", "echo", "return_token_ids", "response_format", "conversation", "prompt"]
)
def test_what_would_be_ignored_in_silence_is_refused(field: str) -> None:
    with pytest.raises(ApiError, match=field):
        request(**{field: 7})


def test_a_refused_field_that_asks_for_nothing_is_known() -> None:
    request(conversation=None, n=1)


def test_an_error_about_the_chat_request_is_told_in_this_apis_names() -> None:
    error = translate.in_our_names(bad_request("response_format can't be enforced: x", "response_format", "c"))
    told = error.body.error
    assert (told.message, told.param, told.code) == ("text.format can't be enforced: x", "text.format", "c")
    other = bad_request("seed is odd", "seed")
    assert translate.in_our_names(other) is other


def answer(**fields: Any) -> ResponseAnswer:
    wanted, _ = request(**fields)
    return ResponseAnswer(new_response("resp_1", wanted, ECHO, INFO), False, lambda _: [])


class Counts:
    """What an answer asks of a choice."""

    class prompt:  # noqa: N801
        ids = (1, 2, 3)

    num_tokens, cached_tokens, reasoning_tokens = 9, 2, 4


COUNTS: Any = Counts()
OUTPUT = Delta(pieces=[Reasoning("hm"), Content("See."), CallPart(0, "{}", "time", "c")], finish_reason="tool_calls")


def names(events: list[Any]) -> list[str]:
    return [event.__struct_config__.tag.removeprefix("response.") for event in events]


def test_events_are_numbered_and_the_response_is_what_they_add_up_to() -> None:
    response = answer(metadata={"a": "b"}, tools=[TOOL])
    events: list[Any] = response.take(OUTPUT) + response.finish(OUTPUT, COUNTS)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert names(events)[:2] == ["created", "in_progress"]
    items = [event.item for event in events if isinstance(event, objects.ItemDone)]
    last = events[-1].response
    assert last == response.snapshot()
    assert last.output == items
    assert [item.status for item in items] == ["completed"] * 3
    assert (last.status, last.temperature, last.metadata) == ("completed", 0.5, {"a": "b"})
    assert msgspec.to_builtins(last.usage) == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 9,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 12,
    }
    assert events[0].response.output == [], "an earlier event does not change"


def test_log_probabilities_are_written_down_once_as_their_text_comes() -> None:
    spelled: list[int] = []

    def spell(logprobs: Logprobs) -> list[TokenLogprob]:
        spelled.extend(id for id, _ in logprobs)
        return [TokenLogprob(str(id), entry.logprob, [], []) for id, entry in logprobs]

    wanted, _ = request()
    response = ResponseAnswer(new_response("resp_1", wanted, ECHO, INFO), False, spell)
    deltas = [Delta(str(id), [id], [TokenLogprobs(-1.0, 1, ())]) for id in range(5)]
    deltas.append(Delta(pieces=[CallPart(0, "{}", "time", "c"), Content("See.")], finish_reason="stop"))
    for delta in deltas:
        response.take(delta)
    assert spelled == [0, 1, 2, 3, 4]
    response.finish(deltas[-1], COUNTS)
    first, _, second = response.snapshot().output
    assert [entry.token for entry in first.content[0].logprobs] == ["0", "1", "2", "3", "4"]
    assert second.content[0].logprobs == []
    assert spelled == [0, 1, 2, 3, 4]


def test_what_was_cut_off_is_incomplete() -> None:
    response, cut = answer(), Delta("Once", finish_reason="length")
    response.take(cut)
    assert names(response.finish(cut, COUNTS))[-2:] == ["output_item.done", "incomplete"]
    now = response.snapshot()
    assert (now.status, now.incomplete_details) == ("incomplete", objects.IncompleteDetails("max_output_tokens"))
    assert [item.status for item in now.output] == ["incomplete"]


def test_a_response_that_waits_says_so_first() -> None:
    response = answer(background=True)
    queued: list[Any] = response.queue()
    assert [event.response.status for event in queued] == ["queued", "queued"]
    begun: list[Any] = response.take(Delta("a"))
    assert names(begun)[0] == "in_progress"
    assert [event.sequence_number for event in queued + begun] == list(range(len(queued + begun)))


def test_failure_and_cancellation_keep_what_there_was() -> None:
    failed, cancelled = answer(), answer()
    failed.take(Delta("Once"))
    cancelled.take(Delta("Once"))
    assert names(failed.fail(unavailable("gone", status=429)))[-1] == "failed"
    assert names(cancelled.cancel())[-1] == "incomplete"
    error = failed.snapshot().error
    assert error == objects.ResponseError("rate_limit_exceeded", "gone")
    assert cancelled.snapshot().status == "cancelled"
    for response in (failed, cancelled):
        assert [item.status for item in response.snapshot().output] == ["incomplete"]


def test_output_comes_back_as_input() -> None:
    response = answer()
    response.take(OUTPUT)
    response.finish(OUTPUT, COUNTS)
    (message,) = to_messages(as_input(response.snapshot().output))
    assert (message["content"], message["reasoning"]) == ("See.", "hm")
    assert message["tool_calls"][0]["id"] == "c"


RUN: Any = None


def remember(store: ResponseStore, id: str, tenant: str = "", text: str = "x", log: EventLog | None = None) -> None:
    response = answer()
    store.begin(id, Live(tenant, response, RUN, read_input(text), log))
    response.take(Delta("said"))
    response.finish(Delta("", finish_reason="stop"), COUNTS)
    store.end(id)


def known(store: ResponseStore, *ids: str) -> list[bool]:
    def has(id: str) -> bool:
        try:
            store.get(id, "")
        except ApiError:
            return False
        return True

    return [has(id) for id in ids]


def test_the_oldest_response_leaves_when_there_are_too_many_or_too_large_ones() -> None:
    store = ResponseStore(2, 20_000)
    for id in ("a", "b", "c"):
        remember(store, id)
    assert known(store, "a", "b", "c") == [False, True, True]
    remember(store, "d", text="x" * 18_000)
    assert known(store, "b", "c", "d") == [False, False, True]
    remember(store, "e", text="x" * 30_000)
    assert known(store, "d", "e") == [False, False], "one that is larger than all room is not kept"
    remember(store, "f")
    store.delete("f", "")
    remember(store, "g", text="x" * 18_000)
    assert known(store, "f", "g") == [False, True], "what is deleted takes no room"


def test_events_count_as_bytes_too() -> None:
    store, log = ResponseStore(10, 20_000), EventLog()
    log.append([b"x" * 30_000], True)
    remember(store, "a", log=log)
    assert known(store, "a") == [False]


def test_a_response_is_there_while_it_runs_and_deleted_ones_do_not_come_back() -> None:
    store = ResponseStore(10, 10_000)
    store.begin("a", Live("", answer(), RUN, read_input("x")))
    assert isinstance(store.get("a", ""), Live)
    store.delete("a", "")
    store.end("a")
    assert known(store, "a") == [False]


def test_responses_of_another_key_are_not_there() -> None:
    store = ResponseStore(10, 10_000)
    remember(store, "a", tenant="me")
    for act in (store.get, store.delete):
        with pytest.raises(ApiError, match="not found") as caught:
            act("a", "you")
        assert caught.value.status == 404
    assert isinstance(store.get("a", "me"), Kept)


def test_the_conversation_goes_on_from_what_was_stored() -> None:
    store = ResponseStore(10, 10_000)
    remember(store, "a", text="Hello?")
    kept = store.get("a", "")
    assert isinstance(kept, Kept)
    assert to_messages(kept.conversation()) == [
        {"role": "user", "content": "Hello?"},
        {"role": "assistant", "content": "said"},
    ]
    assert json.loads(kept.response) == json.loads(
        encode(msgspec.json.decode(kept.response, type=objects.ResponsesResponse))
    )


def test_background_responses_are_refused_when_too_many_run() -> None:
    store = ResponseStore(1, 10_000)
    store.check_background()
    store.begin("a", Live("", answer(), RUN, []))
    with pytest.raises(ApiError) as caught:
        store.check_background()
    assert caught.value.status == 429


@pytest.mark.parametrize("owner", [0, 1, 0xFFFF])
def test_an_id_says_whose_it_is(owner: int) -> None:
    id = new_response_id(owner)
    assert owner_of(id) == owner
    assert id != new_response_id(owner)


@pytest.mark.parametrize("id", ["", "resp_", "resp_" + "z" * 32, "0" * 37, "resp_" + "0" * 31, "resp_../../../../x"])
def test_what_is_no_id_of_ours_is_nobodys(id: str) -> None:
    assert owner_of(id) is None


def test_readers_of_a_log_get_what_comes_behind_their_place() -> None:
    log, woken = EventLog(), []
    log.append([b"0", b"1"], False)
    with log.follow(-1) as whole, log.follow(0) as rest, log.follow(5) as later:
        for name, reader in (("whole", whole), ("rest", rest)):
            reader.on_output(lambda name=name: woken.append(name))  # type: ignore[misc]
        assert sorted(woken) == ["rest", "whole"], "something is there already"
        assert (whole.take(), rest.take(), later.take()) == (b"01", b"1", b"")
        log.append([b"2"], True)
        assert sorted(woken) == ["rest", "rest", "whole", "whole"]
        assert (whole.take(), rest.take(), later.take()) == (b"2", b"2", b"")
        assert (whole.ended, rest.ended, later.ended) == (True, True, True)
    log.append([], True)
    assert len(woken) == 4


@pytest.mark.parametrize("room", [1, 3, 4, 5, 7, 20])
def test_the_fewest_turns_are_left_out(room: int) -> None:
    messages: Messages = [{"role": "system"}, {"role": "developer"}]
    for _ in range(5):
        messages += [{"role": "user"}, {"role": "assistant"}]
    messages.append({"role": "user"})
    asked = 0

    async def fits(some: Messages) -> bool:
        nonlocal asked
        asked += 1
        return len(some) <= room + 2

    found = asyncio.run(fitting(messages, fits))
    assert asked <= 4
    assert found[:2] == messages[:2]
    turns = found[2:]
    assert turns == messages[len(messages) - len(turns) :]
    assert turns[0]["role"] == "user"
    assert len(turns) == max(size for size in (1, 3, 5, 7, 9, 11) if size <= room)
