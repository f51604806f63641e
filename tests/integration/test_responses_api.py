"""/v1/responses as the openai client sees it, over whole deployments of the demo model."""

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from support.deployment import Deployment

pytestmark = pytest.mark.slow

FLAGS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")
QUESTION = "What is the weather in Cologne?"
TOOLS: list[Any] = [
    {
        "type": "function",
        "name": "weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Cologne", "Bonn"]},
                "day": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city", "day"],
            "additionalProperties": False,
        },
        "strict": True,
    },
    {"type": "function", "name": "time", "parameters": None, "strict": False},
]
WRITTEN = r'<think>I must\nlook\.</think>\n\nLet me see\. <tool_call>\{"name": "time", "arguments": \{\}\}</tool_call>'
"""What a model that reasons and calls tools writes; the demo model needs a grammar for it."""
EVENTS: pydantic.TypeAdapter[Any] = pydantic.TypeAdapter(ResponseStreamEvent)


@pytest.fixture(scope="module")
def served() -> Iterator[Deployment]:
    with Deployment(*FLAGS, "--prefill", "1", "--decode", "1", "--max-model-len", "1024") as deployment:
        yield deployment


@pytest.fixture(scope="module")
def client(served: Deployment) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def asked(fields: dict[str, Any]) -> dict[str, Any]:
    """A request, greedy unless it says otherwise: what a model with little sense samples may be anything."""
    return {"model": "demo", "input": QUESTION, "max_output_tokens": 40, "temperature": 0, **fields}


def create(client: openai.OpenAI, **fields: Any) -> Response:
    """A whole response, checked against the client's types."""
    response = client.responses.create(**asked(fields))
    return Response.model_validate(response.to_dict())


def streamed(client: openai.OpenAI, **fields: Any) -> list[Any]:
    """The events of a streamed response, each checked against the client's types."""
    return checked(client.responses.create(**asked(fields), stream=True))


def checked(stream: Any) -> list[Any]:
    events = [EVENTS.validate_python(event.to_dict()) for event in stream]
    numbers = [event.sequence_number for event in events]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return events


def kinds(events: list[Any]) -> list[str]:
    """The types of events, each run of equal ones once."""
    found = [event.type.removeprefix("response.") for event in events]
    return [kind for index, kind in enumerate(found) if index == 0 or kind != found[index - 1]]


def without_ids(response: Response) -> dict[str, Any]:
    """What two responses to the same request have in common."""
    fields = response.to_dict()
    for name in ("id", "created_at", "completed_at", "usage"):
        fields.pop(name)
    for item in fields["output"]:  # type: ignore[attr-defined]
        item.pop("id")
        item.pop("call_id", None)
    return fields


def test_a_response_says_what_a_chat_completion_says(client: openai.OpenAI) -> None:
    response = create(client, instructions="Be brief.", metadata={"a": "b"}, user="me")
    messages: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": QUESTION}]
    chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=40, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    assert chat.usage is not None
    assert response.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert (response.metadata, response.user, response.instructions) == ({"a": "b"}, "me", "Be brief.")
    assert (response.temperature, response.truncation, response.tool_choice) == (0, "disabled", "auto")


def test_the_end_of_tokens_makes_a_response_incomplete(client: openai.OpenAI) -> None:
    response = create(client, max_output_tokens=5, extra_body={"ignore_eos": True})
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert (message.type, message.status) == ("message", "incomplete")
    assert response.usage is not None
    assert response.usage.output_tokens == 5
    roomy = create(client, max_output_tokens=100_000, extra_body={"stop": ["."]})
    assert roomy.status == "completed", "max_output_tokens is an upper bound"


def test_text_comes_in_events_that_add_up_to_the_whole(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "temperature": 1.0,
        "extra_body": {"seed": 3, "structured_outputs": {"regex": "[a-z ]{40}"}},
    }
    whole = create(client, **fields, include=["message.output_text.logprobs"], top_logprobs=2)
    events = streamed(client, **fields, include=["message.output_text.logprobs"], top_logprobs=2)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    text = "".join(delta.delta for delta in deltas)
    assert text == whole.output_text
    last = events[-1].response
    assert without_ids(last) == without_ids(whole)
    assert last.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]
    told = [entry for delta in deltas for entry in delta.logprobs]
    content = whole.output[0].content[0]  # type: ignore[union-attr]
    assert [entry.token for entry in told] == [entry.token for entry in content.logprobs]  # type: ignore[union-attr]
    assert "".join(entry.token for entry in told) == text
    assert {len(entry.top_logprobs) for entry in told} == {2}


def test_reasoning_text_and_calls_come_in_the_order_in_which_they_were_written(client: openai.OpenAI) -> None:
    fields: dict[str, Any] = {
        "tools": TOOLS,
        "max_output_tokens": 200,
        "extra_body": {"structured_outputs": {"regex": WRITTEN}, "seed": 1},
    }
    whole = create(client, **fields)
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    reasoning, message, call = whole.output
    assert reasoning.content[0].text == "I must\nlook."  # type: ignore[union-attr]
    assert message.content[0].text == "Let me see. "  # type: ignore[union-attr]
    assert (call.name, call.arguments) == ("time", "{}")  # type: ignore[union-attr]
    assert whole.usage is not None
    assert 0 < whole.usage.output_tokens_details.reasoning_tokens < whole.usage.output_tokens
    events = streamed(client, **fields)
    assert kinds(events) == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        "reasoning_text.delta",
        "reasoning_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "content_part.added",
        "output_text.delta",
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    last = events[-1].response
    assert without_ids(last) == without_ids(whole)
    assert last.usage.output_tokens_details == whole.usage.output_tokens_details


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "name": "weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "weather"}]},
    ],
)
def test_a_tool_that_must_be_called_is_enforced(client: openai.OpenAI, choice: Any) -> None:
    fields = {
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        "max_output_tokens": 300,
    }
    for response in (create(client, **fields), streamed(client, **fields)[-1].response):
        assert response.status == "completed"
        (call,) = [item for item in response.output if item.type == "function_call"]
        arguments = json.loads(call.arguments)
        if choice != "required" or call.name == "weather":
            assert arguments["city"] in ("Cologne", "Bonn")
            assert 1 <= arguments["day"] <= 9


def test_the_clients_own_stream_helper_follows(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model="demo", input=QUESTION, tools=TOOLS, tool_choice="required", max_output_tokens=300, temperature=0
    ) as stream:
        snapshot = [event.snapshot for event in stream if event.type == "response.function_call_arguments.delta"][-1]
        final = stream.get_final_response()
    assert json.loads(snapshot) is not None
    assert final.output[-1].type == "function_call"


class Person(pydantic.BaseModel):
    name: str
    age: int


def test_text_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    parsed = client.responses.parse(
        model="demo", input="Invent a person.", text_format=Person, max_output_tokens=200, extra_body={"seed": 1}
    )
    assert isinstance(parsed.output_parsed, Person)
    assert parsed.text is not None
    assert parsed.text.format is not None
    assert parsed.text.format.type == "json_schema"


def test_tools_are_called_and_their_outputs_given_back(client: openai.OpenAI) -> None:
    first = create(client, tools=TOOLS, tool_choice={"type": "function", "name": "weather"}, max_output_tokens=200)
    (call,) = [item for item in first.output if item.type == "function_call"]
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "Rain."}
    by_id = create(client, input=[output], previous_response_id=first.id, tools=TOOLS)
    said: list[Any] = [{"role": "user", "content": QUESTION}, *(item.to_dict() for item in first.output), output]
    by_hand = create(client, input=said, tools=TOOLS)
    assert by_id.output_text == by_hand.output_text
    assert by_id.usage is not None
    assert by_hand.usage is not None
    assert by_id.usage.input_tokens == by_hand.usage.input_tokens


def test_a_conversation_goes_on_and_its_beginning_is_cached(client: openai.OpenAI) -> None:
    first = create(client, input=QUESTION * 6, instructions="Be brief.")
    second = create(client, input="And in Bonn?", previous_response_id=first.id, instructions="Be brief.")
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTION * 6},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And in Bonn?"},
    ]
    chat = client.chat.completions.create(model="demo", messages=messages, max_tokens=40, temperature=0)
    assert second.output_text == chat.choices[0].message.content
    assert second.usage is not None
    assert second.usage.input_tokens_details.cached_tokens >= 16
    items = client.responses.input_items.list(second.id, order="asc").data
    assert [item.type for item in items] == ["message", "message", "message"]
    assert [item.role for item in items] == ["user", "assistant", "user"]  # type: ignore[union-attr]
    page = client.responses.input_items.list(second.id, limit=2)
    assert [item.id for item in page] == [item.id for item in reversed(items)], "all pages, latest first"


def test_stored_responses_are_found_until_they_are_deleted(client: openai.OpenAI) -> None:
    stored, passing = create(client), create(client, store=False)
    assert client.responses.retrieve(stored.id).to_dict() == stored.to_dict()
    assert client.responses.cancel(stored.id).to_dict() == stored.to_dict(), "it has ended already"
    client.responses.delete(stored.id)
    for gone in (stored.id, passing.id, "resp_nonsense"):
        with pytest.raises(openai.NotFoundError, match="not found"):
            client.responses.retrieve(gone)
    with pytest.raises(openai.NotFoundError, match="Previous response"):
        create(client, previous_response_id=stored.id)


def test_a_background_response_runs_alone_and_its_events_can_be_read_again(
    served: Deployment, client: openai.OpenAI
) -> None:
    queued = create(client, background=True, extra_body={"ignore_eos": True, "seed": 1})
    assert (queued.status, queued.output) == ("queued", [])
    while (now := client.responses.retrieve(queued.id)).status in ("queued", "in_progress"):
        pass
    assert (now.status, bool(now.output_text)) == ("incomplete", True)
    fields: dict[str, Any] = {"model": "demo", "input": QUESTION, "background": True, "max_output_tokens": 40}
    stream = client.responses.create(**fields, stream=True)
    first = next(iter(stream))
    stream.close()
    assert first.type == "response.created"
    assert first.response.status == "queued"
    events = checked(client.responses.retrieve(first.response.id, stream=True))
    assert kinds(events)[:3] == ["created", "queued", "in_progress"]
    assert events[-1].response.to_dict() == client.responses.retrieve(first.response.id).to_dict()
    rest = checked(client.responses.retrieve(first.response.id, stream=True, starting_after=4))
    assert rest == events[5:]
    served.wait_idle()


def test_cancelling_ends_the_work_of_background_and_streamed_responses(
    served: Deployment, client: openai.OpenAI
) -> None:
    endless: dict[str, Any] = {"max_output_tokens": 900, "extra_body": {"ignore_eos": True}}
    before = served.total("baton_requests_total", 'outcome="aborted"')
    running = create(client, background=True, **endless)
    cancelled = client.responses.cancel(running.id)
    assert cancelled.status == "cancelled"
    assert client.responses.retrieve(running.id).status == "cancelled"
    stream = iter(client.responses.create(model="demo", input=QUESTION, stream=True, **endless))
    first: Any = next(stream)
    assert client.responses.retrieve(first.response.id).status == "in_progress"
    client.responses.cancel(first.response.id)
    last: Any = [*stream][-1]
    assert (last.type, last.response.status) == ("response.incomplete", "cancelled")
    served.wait_idle()
    assert served.total("baton_requests_total", 'outcome="aborted"') == before + 2


def test_a_client_that_leaves_frees_everything(served: Deployment, client: openai.OpenAI) -> None:
    with client.responses.create(
        model="demo", input=QUESTION, stream=True, max_output_tokens=900, extra_body={"ignore_eos": True}
    ) as stream:
        first: Any = next(iter(stream))
    served.wait_idle()
    assert client.responses.retrieve(first.response.id).status == "cancelled"


def test_the_oldest_turns_are_left_out_when_the_client_allows_it(client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": f"{number} " * 100} for number in range(12)]
    with pytest.raises(openai.BadRequestError, match="maximum context length"):
        create(client, input=turns)
    cut = create(client, input=turns, truncation="auto")
    assert cut.usage is not None
    assert 500 < cut.usage.input_tokens < 1024
    assert cut.truncation == "auto"


def test_input_tokens_are_counted(client: openai.OpenAI) -> None:
    response = create(client)
    assert response.usage is not None
    assert client.responses.input_tokens.count(model="demo", input=QUESTION).input_tokens == response.usage.input_tokens


def test_the_ledger_is_told_for_the_asking(served: Deployment) -> None:
    body = {"input": QUESTION, "max_output_tokens": 5}
    answer = served.client.post("/v1/responses", json=body, headers={"x-baton-ledger": "1"}).json()
    assert (answer["baton_ledger"]["prefill_worker"], answer["baton_ledger"]["transport"]) == ("prefill-0", "shm")


@pytest.mark.parametrize(
    ("fields", "param", "words"),
    [
        ({"input": []}, "input", "empty"),
        ({"input": 5}, "input", "input"),
        ({"input": [{"role": "king", "content": "x"}]}, "input[0].role", "role"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type", "previous_response_id"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
            "text only",
        ),
        ({"max_output_tokens": 0}, "max_output_tokens", "1"),
        ({"temperature": -1}, "temperature", "temperature"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "no built-in tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "nobody"}}, "tool_choice", "nobody"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format", "schema"),
        (
            {
                "text": {
                    "format": {"type": "json_schema", "name": "x", "schema": {"type": "array", "uniqueItems": True}}
                }
            },
            "text.format",
            "uniqueItems",
        ),
        ({"include": ["everything"]}, "include", "everything"),
        ({"truncation": "some"}, "truncation", "auto"),
        ({"background": True, "store": False}, "background", "store"),
        ({"conversation": "conv_1"}, "conversation", "not supported"),
        ({"n": 2}, "n", "not supported"),
        ({"metadata": {str(number): "x" for number in range(17)}}, "metadata", "16"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(
    served: Deployment, fields: dict[str, Any], param: str, words: str
) -> None:
    for stream in (False, True):
        answer: httpx.Response = served.client.post(
            "/v1/responses", json={"input": QUESTION, **fields, "stream": stream}
        )
        assert answer.status_code == 400, answer.text
        assert len(answer.content) < 2000
        error = answer.json()["error"]
        assert error["param"] == param
        assert re.search(words, error["message"])


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("?stream=perhaps", "stream"),
        ("?stream=true", "stream"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?order=random", "order"),
        ("/input_items?after=nobody", "after"),
    ],
)
def test_a_wrong_parameter_in_the_url_is_named(
    served: Deployment, client: openai.OpenAI, path: str, param: str
) -> None:
    answer = served.client.get(f"/v1/responses/{create(client, max_output_tokens=1).id}{path}")
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_wrong_method_is_told_what_is_possible(served: Deployment) -> None:
    answer = served.client.put("/v1/responses/resp_1")
    assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET")


def test_the_document_describes_every_path_and_type(served: Deployment) -> None:
    text = served.client.get("/openapi.json").text
    document = json.loads(text)
    wanted = {"/v1/responses": {"post"}, "/v1/responses/input_tokens": {"post"}}
    wanted |= {"/v1/responses/{response_id}": {"get", "delete"}, "/v1/responses/{response_id}/cancel": {"post"}}
    wanted |= {"/v1/responses/{response_id}/input_items": {"get"}}
    wanted |= {"/v1/messages": {"post"}, "/v1/messages/count_tokens": {"post"}}
    assert {path: set(document["paths"][path]) for path in wanted} == wanted
    referred = set(re.findall(r'"#/components/schemas/([^"]+)"', text))
    assert referred <= set(document["components"]["schemas"])
    assert {"TextDone", "MessageStart", "MessagesError"} <= set(document["components"]["schemas"])


def test_what_runs_when_the_server_must_stop_is_told_in_each_apis_way(tiny_model: Path) -> None:
    words = ("--load-format", "dummy", "--num-blocks", "600", "--unified", "1", "--shutdown-timeout", "0.2")
    with Deployment(*words, model=str(tiny_model)) as deployment:
        text, endless = "Say something.", {"ignore_eos": True, "temperature": 0}
        response = {"input": text, "max_output_tokens": 4000, **endless}
        message = {"messages": [{"role": "user", "content": text}], "max_tokens": 4000, **endless}
        assert deployment.client.post("/v1/responses", json={**response, "background": True}).status_code == 200
        with (
            ThreadPoolExecutor() as pool,
            deployment.client.stream("POST", "/v1/responses", json={**response, "stream": True}) as responses,
            deployment.client.stream("POST", "/v1/messages", json={**message, "stream": True}) as messages,
        ):
            wholes = [
                pool.submit(deployment.client.post, path, json=body)
                for path, body in (("/v1/responses", response), ("/v1/messages", message))
            ]
            streams = [
                (line[6:] for line in each.iter_lines() if line[:6] == "data: ") for each in (responses, messages)
            ]
            assert [json.loads(next(stream))["type"] for stream in streams] == ["response.created", "message_start"]
            while deployment.total("baton_requests_running") < 5:
                pass
            deployment.process.terminate()
            failed, error = (json.loads([*stream][-1]) for stream in streams)
            answers = [whole.result() for whole in wholes]
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert "shutting down" in failed["response"]["error"]["message"]
        assert (error["type"], error["error"]["type"]) == ("error", "overloaded_error")
        assert [answer.status_code for answer in answers] == [503, 503]
        assert deployment.wait() == 0
        assert not any("Traceback" in line for line in deployment.lines)
