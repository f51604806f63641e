"""What a chat request with tools becomes: prompt, grammar, parser and answer."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from baton.frontend.api.blocks import Blocks, Grows, Kind
from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.errors import ApiError
from baton.frontend.api.formats import ChatFormat
from baton.frontend.api.params import read_wishes
from baton.frontend.api.prompts import Prompts
from baton.frontend.api.requests import ChatCompletionRequest, parse
from baton.frontend.api.responses import Usage, encode
from baton.frontend.chat_template import ChatTemplate
from baton.frontend.engine_client import Output
from baton.frontend.instructions import Finished
from baton.frontend.model_info import ModelInfo, SamplingDefaults
from baton.frontend.structured.constraint import schema_constraint
from baton.frontend.structured.grammars import Grammars
from baton.frontend.tokenizer import Tokenizer
from baton.frontend.tools.events import Content, Reasoning
from baton.frontend.tools.output import CallPart
from baton.frontend.tools.plan import OutputPlan, ToolServing
from baton.proto.config import FrontendConfig, ModelConfig
from baton.proto.grammar import grammar_tokenizer, new_matcher
from baton.proto.lifecycle import Outcome
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import Ledger, TokenLogprobs

SPECIAL = ("<eos>", "[TOOL_CALLS]", "[THINK]", "[/THINK]")


def byte_tokenizer() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE({char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(list(SPECIAL))
    return backend


TOKENIZER = Tokenizer(byte_tokenizer(), {"eos_token": "<eos>"})
INFO = ModelInfo(("m",), 1000, 300, (256,), SamplingDefaults())
TEMPLATE = ChatTemplate(
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.arguments.city }}{% endfor %}{% endfor %}"
    "{% for t in tools or [] %}({{ t.function.name }}){% endfor %}",
    {},
)
PROMPTS = Prompts(TOKENIZER, TEMPLATE, INFO)
VOCABULARY = grammar_tokenizer(byte_tokenizer(), 300)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "properties": {"city": {"$ref": "#/$defs/city"}},
                "required": ["city"],
                "$defs": {"city": {"enum": ["Köln", "Bonn"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "time"}},
]


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(TOKENIZER, INFO)
    yield grammars
    grammars.close()


def serving(**flags: Any) -> ToolServing:
    config = FrontendConfig("f", ModelConfig("", ("m",)), "", "", **flags)
    return ToolServing(config, TOKENIZER)


def chat(**fields: Any) -> tuple[ChatCompletionRequest, dict[str, Any]]:
    body = {"messages": [{"role": "user", "content": "hi"}], **fields}
    request, raw, unknown = parse(json.dumps(body).encode(), ChatCompletionRequest)
    assert unknown == []
    return request, raw


def plan_of(server: ToolServing, prompt: str = "", **fields: Any) -> OutputPlan:
    request, raw = chat(tools=TOOLS, **fields)
    plan = server.plan(request, raw["tools"], np.array(TOKENIZER.encode(prompt), dtype=np.int32))
    assert plan is not None
    return plan


def matches(grammar: str, tokens: list[int]) -> bool:
    matcher = new_matcher(VOCABULARY, grammar)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


def grammar_of(grammars: Grammars, plan: OutputPlan) -> str:
    assert plan.constraint is not None
    return grammars.make(plan.constraint)


def test_without_tools_and_reasoning_all_is_content() -> None:
    request, _ = chat()
    assert serving().plan(request, (), np.zeros(3, dtype=np.int32)) is None
    request, raw = chat(tools=TOOLS, tool_choice="none")
    assert serving().plan(request, raw["tools"], np.zeros(3, dtype=np.int32)) is None


def test_the_grammar_of_a_named_tool_is_its_parameters(grammars: Grammars) -> None:
    plan = plan_of(serving(), tool_choice={"type": "function", "function": {"name": "weather"}})
    grammar = grammar_of(grammars, plan)
    assert matches(grammar, TOKENIZER.encode('{"city": "Köln"}'))
    assert not matches(grammar, TOKENIZER.encode('{"city": "Paris"}'))
    assert not matches(grammar, TOKENIZER.encode('"Köln"'))


def test_the_grammar_of_required_calls_has_every_tool_with_its_own_definitions(grammars: Grammars) -> None:
    grammar = grammar_of(grammars, plan_of(serving(), tool_choice="required"))
    weather, time = '{"name": "weather", "parameters": {"city": "Bonn"}}', '{"name":"time","parameters":{}}'
    assert matches(grammar, TOKENIZER.encode(f"[{weather}, {time}]"))
    assert not matches(grammar, TOKENIZER.encode("[]"))
    assert not matches(grammar, TOKENIZER.encode('[{"name": "weather", "parameters": {}}]'))
    single = grammar_of(grammars, plan_of(serving(), tool_choice="required", parallel_tool_calls=False))
    assert matches(single, TOKENIZER.encode(f"[{time}]"))
    assert not matches(single, TOKENIZER.encode(f"[{time}, {time}]"))


@pytest.mark.parametrize(
    ("parser", "prompt", "thought"),
    [
        ("qwen3", "", "<think>hm</think>\n\n"),
        ("qwen3", "", ""),
        ("qwen3", "<think>\n", "hm</think>"),
        ("qwen3", "<think>\n\n</think>\n\n", ""),
        ("deepseek_r1", "", "hm</think>\n"),
        ("mistral", "", "[THINK]hm[/THINK]"),
        ("mistral", "[THINK]", "hm[/THINK]"),
        ("mistral", "", "\n "),
    ],
)
def test_reasoning_may_stand_before_a_constrained_answer(
    grammars: Grammars, parser: str, prompt: str, thought: str
) -> None:
    server = serving(reasoning_parser=parser)
    request, _ = chat()
    plan = server.plan(request, (), np.array(TOKENIZER.encode(prompt), dtype=np.int32))
    assert plan is not None
    assert plan.keeps_special_tokens == (parser == "mistral")
    before = server.before_answer(plan)
    grammar = grammars.make(schema_constraint({"type": "integer"}, "p"), before)
    assert matches(grammar, TOKENIZER.encode(f"{thought}12"))
    assert not matches(grammar, TOKENIZER.encode(f"{thought}x"))
    parser = dataclasses.replace(plan, spaced=bool(before)).new_parser()
    pieces = [*parser.feed(f"{thought}12"), *parser.finish()]
    assert "".join(piece.text for piece in pieces if isinstance(piece, Content)) == "12"
    assert "".join(piece.text for piece in pieces if isinstance(piece, Reasoning)) == ("hm" if "hm" in thought else "")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "time"}}])
def test_calls_have_ids_that_the_models_template_takes_back(choice: Any) -> None:
    flags = {"enable_auto_tool_choice": True, "tool_call_parser": "mistral", "reasoning_parser": "mistral"}
    plan = dataclasses.replace(plan_of(serving(**flags), tool_choice=choice), spaced=True)
    parser = plan.new_parser()
    written = '[THINK]hm[/THINK]\n\n[{"name": "time", "parameters": {}}]'
    pieces = [*parser.feed(written), *parser.finish()]
    (call,) = [piece for piece in pieces if isinstance(piece, CallPart)]
    assert call.name == "time"
    assert len(call.id) == 9
    assert call.id.isalnum()
    assert not [piece for piece in pieces if isinstance(piece, Content)]


def test_a_tool_whose_schema_has_an_id_may_be_required(grammars: Grammars) -> None:
    parameters = {"$id": "https://x.y/z", "properties": {"a": {"$ref": "#/$defs/X"}}, "$defs": {"X": {"type": "null"}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    request, raw = chat(tools=tools, tool_choice="required")
    plan = serving().plan(request, raw["tools"], np.zeros(3, dtype=np.int32))
    assert plan is not None
    assert matches(grammar_of(grammars, plan), TOKENIZER.encode('[{"name": "f", "parameters": {"a": null}}]'))


@pytest.mark.parametrize("flags", [{}, {"tool_call_parser": "hermes"}, {"enable_auto_tool_choice": True}])
def test_auto_needs_its_flags(flags: dict[str, Any]) -> None:
    with pytest.raises(ApiError, match="--enable-auto-tool-choice"):
        plan_of(serving(**flags))


def test_markers_that_are_special_tokens_stay_in_the_text() -> None:
    flags = {"enable_auto_tool_choice": True}
    assert plan_of(serving(tool_call_parser="mistral", **flags)).keeps_special_tokens
    assert not plan_of(serving(tool_call_parser="hermes", **flags)).keeps_special_tokens


def test_the_template_sees_tools_and_arguments_as_objects() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "tool", "content": "Rain."}]
    request, raw = chat(messages=messages, tools=TOOLS)
    prompt = PROMPTS.of_chat(request, raw)
    assert TOKENIZER.decode(prompt.ids.tolist()) == "[assistant]Bonn[tool]Rain.(weather)(time)"
    call["function"]["arguments"] = "{"  # type: ignore[index]
    request, raw = chat(messages=messages)
    with pytest.raises(ApiError, match="not JSON"):
        PROMPTS.of_chat(request, raw)


class _Reader:
    def stop(self, index: int) -> Finished | None:
        return None


def answer(text: str, plan: OutputPlan, outcome: Outcome = Outcome.STOP, step: int = 1) -> tuple[Any, list[Any]]:
    """The chat message, and the chunks' deltas, of this output with `step` tokens at a time."""
    request, raw = chat()
    wishes = read_wishes(request, INFO, 5)
    wishes = wishes.keeping_special_tokens() if plan.keeps_special_tokens else wishes
    ids = TOKENIZER.encode(text)
    choice = Choice(0, PROMPTS.of_chat(request, raw), wishes.sampling, wishes, TOKENIZER, plan)
    form = ChatFormat("m", wishes, TOKENIZER)
    whole = Delta()
    deltas: list[Any] = []
    for start in range(0, len(ids) + 1, step):
        output = Output()
        output.tokens = ids[start : start + step]
        if start + step > len(ids):
            output.finished = Finished((0, 0), outcome, Ledger(), len(ids))
        delta = choice.take(output, _Reader())
        if delta.brings:
            chunks = form.chunks(choice, delta, not deltas, None)
            deltas += [json.loads(encode(chunk))["choices"][0]["delta"] for chunk in chunks]
        whole.extend(delta)
    (found,) = json.loads(encode(form.whole([(choice, whole)], Usage(0, 0, 0), msgspec.UNSET)))["choices"]
    return found, deltas


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_an_answer_with_reasoning_text_and_calls(step: int) -> None:
    server = serving(enable_auto_tool_choice=True, tool_call_parser="mistral", reasoning_parser="mistral")
    calls = '[{"name": "weather", "arguments": {"city": "Köln"}}, {"name": "time", "arguments": {}}]'
    found, deltas = answer(f"[THINK]hm[/THINK]Well.[TOOL_CALLS]{calls}", plan_of(server), step=step)
    message = found["message"]
    assert found["finish_reason"] == "tool_calls"
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("Well.", "hm", "hm")
    assert [call["function"]["name"] for call in message["tool_calls"]] == ["weather", "time"]
    assert json.loads(message["tool_calls"][0]["function"]["arguments"]) == {"city": "Köln"}
    pieces = [part for delta in deltas for part in delta.get("tool_calls", ())]
    assert sum("id" in part for part in pieces) == 2
    for index in (0, 1):
        written = "".join(part["function"]["arguments"] for part in pieces if part["index"] == index)
        assert written == message["tool_calls"][index]["function"]["arguments"]
    assert "".join(delta.get("content", "") for delta in deltas) == "Well."
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "hm"


def test_later_calls_are_left_out_when_they_may_not_be_parallel() -> None:
    server = serving(enable_auto_tool_choice=True, tool_call_parser="hermes")
    text = '<tool_call>{"name": "time", "arguments": {}}</tool_call>' * 2
    found, _ = answer(text, plan_of(server, parallel_tool_calls=False))
    assert len(found["message"]["tool_calls"]) == 1


def test_a_call_that_was_cut_short_says_length() -> None:
    server = serving(enable_auto_tool_choice=True, tool_call_parser="hermes")
    found, _ = answer('<tool_call>{"name": "time", "arguments": {"a', plan_of(server), Outcome.LENGTH)
    assert found["finish_reason"] == "length"
    assert found["message"]["tool_calls"][0]["function"]["arguments"] == '{"a'


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_a_call_that_can_not_be_read_is_the_answers_text_whole_and_streamed(step: int) -> None:
    server = serving(enable_auto_tool_choice=True, tool_call_parser="hermes")
    text = 'Well. <tool_call>{"name": "time", "arguments": }</tool_call>'
    found, deltas = answer(text, plan_of(server), step=step)
    assert (found["message"]["content"], found["message"].get("tool_calls")) == (text, None)
    assert found["finish_reason"] == "stop"
    assert "".join(delta.get("content", "") for delta in deltas) == text
    assert not any("tool_calls" in delta for delta in deltas)


def test_reasoning_can_be_left_out() -> None:
    server = serving(reasoning_parser="qwen3")
    request, _ = chat(include_reasoning=False)
    plan = server.plan(request, (), np.zeros(0, dtype=np.int32))
    assert plan is not None
    found, _ = answer("<think>hm</think>yes", plan)
    message = found["message"]
    assert (message["reasoning"], message["reasoning_content"], message["content"]) == (None, None, "yes")


def test_prompt_logprobs_are_told_beside_reasoning() -> None:
    choice = reasoning_choice(prompt_logprobs=0)
    told = PromptLogprobs(0, b"")
    choice.take(Output(tokens=TOKENIZER.encode("ab"), prompt_logprobs=told), _Reader())
    assert choice.prompt_logprobs is told


def reasoning_choice(**fields: Any) -> Choice:
    request, raw = chat(**fields)
    plan = serving(reasoning_parser="qwen3").plan(request, (), np.zeros(0, dtype=np.int32))
    wishes = read_wishes(request, INFO, 5)
    return Choice(0, PROMPTS.of_chat(request, raw), wishes.sampling, wishes, TOKENIZER, plan)


def fed(choice: Choice, text: str, step: int) -> Delta:
    """All deltas of an output that comes `step` tokens at a time; its end comes with the last of them."""
    whole, ids = Delta(), TOKENIZER.encode(text)
    for start in range(0, len(ids), step):
        end = Finished((0, 0), Outcome.STOP, Ledger(cached_tokens=1), len(ids)) if start + step >= len(ids) else None
        delta = choice.take(Output(ids[start : start + step], [], end), _Reader())
        whole.extend(delta)
        if delta.finish_reason is not None:
            break
    return whole


@pytest.mark.parametrize("step", [1, 5, 1000])
def test_tokens_up_to_the_end_of_the_reasoning_are_counted(step: int) -> None:
    choice = reasoning_choice()
    delta = fed(choice, "<think>hm</think>yes", step)
    assert (delta.reasoning, delta.text, choice.num_tokens) == ("hm", "yes", 20)
    assert choice.reasoning_tokens == len("<think>hm</think>")
    silent = reasoning_choice()
    fed(silent, "yes", step)
    assert silent.reasoning_tokens == 0
    endless = reasoning_choice()
    fed(endless, "<think>hm", step)
    assert endless.reasoning_tokens == 9


@pytest.mark.parametrize("before", [0, 3, 11])
def test_a_stop_string_in_the_reasoning_ends_the_answer_there(before: int) -> None:
    """Also when the stream's own end has come with the same tokens."""
    choice = reasoning_choice(stop="ST")
    ids = TOKENIZER.encode("<think>hm STOP yes")
    whole = choice.take(Output(ids[:before]), _Reader())
    whole.extend(
        choice.take(Output(ids[before:], [], Finished((0, 0), Outcome.STOP, Ledger(cached_tokens=1), 18)), _Reader())
    )
    assert (whole.reasoning, whole.text, whole.finish_reason, whole.stop_reason) == ("hm ", "", "stop", "ST")
    assert (choice.num_tokens, choice.ledger.cached_tokens) == (len("<think>hm ST"), 1)


def test_log_probabilities_of_markers_belong_to_no_text() -> None:
    choice = reasoning_choice(logprobs=True)
    kept: list[int] = []
    blocks = Blocks()
    for token in TOKENIZER.encode("<think>hm</think>\n\nyes"):
        output = Output([token], [TokenLogprobs(-1.0, 1, ())])
        for change in blocks.take(choice.take(output, _Reader())):
            if isinstance(change, Grows) and change.block.kind is Kind.TEXT:
                kept += [id for id, _ in change.logprobs]
    assert TOKENIZER.decode(kept, skip_special_tokens=False) == "\n\nyes"


def test_a_plug_in_is_named_by_the_flag(tmp_path: Path) -> None:
    file = tmp_path / "shouting.py"
    file.write_text(
        "from baton.frontend.tools.think import ThinkParser\n"
        "class Shouting(ThinkParser):\n"
        "    names = ('shouting',)\n"
        "    start, end = 'HM', 'AH'\n"
    )
    server = serving(reasoning_parser="shouting", tool_parser_plugin=str(file))
    request, _ = chat()
    plan = server.plan(request, (), np.zeros(0, dtype=np.int32))
    assert plan is not None
    found, _ = answer("HM well AH yes", plan)
    assert (found["message"]["reasoning"], found["message"]["content"]) == (" well ", " yes")
