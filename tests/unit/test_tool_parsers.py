"""What parsers find in models' outputs; the same however the text is cut."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.frontend.tools.events import Arguments, CallBegins, Content, Event, Reasoning
from baton.frontend.tools.parser import Parser
from baton.frontend.tools.registry import (
    REASONING_PARSERS,
    TOOL_PARSERS,
    find_reasoning_parser,
    find_tool_parser,
)
from baton.frontend.tools.required import NamedParser, RequiredParser
from baton.proto.errors import UserError

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
ARGS = {"city": 'Köln "am Rhein" {}[]\\', "days": 3, "more": {"a": [1, None, {"b": "}"}]}}
WRITTEN = json.dumps(ARGS, ensure_ascii=False)
SIMPLE = {"city": "Köln", "days": 3}


def merged(events: list[Event]) -> list[Any]:
    """Neighbouring pieces of one kind joined: a text, a call's (name, arguments)."""
    found: list[Any] = []
    for event in events:
        if isinstance(event, CallBegins):
            found.append(("call", event.name, ""))
        elif isinstance(event, Arguments):
            assert found[-1][0] == "call"
            found[-1] = (*found[-1][:2], found[-1][2] + event.text)
        else:
            kind = type(event).__name__.lower()
            if found and found[-1][0] == kind:
                found[-1] = (kind, found[-1][1] + event.text)
            else:
                found.append((kind, event.text))
    return found


def parse(parser: Parser, *pieces: str) -> list[Any]:
    driver = parser.drive()
    events = [event for piece in pieces for event in driver.feed(piece)]
    return merged(events + driver.finish())


def calls(found: list[Any]) -> list[tuple[str, Any]]:
    return [(item[1], json.loads(item[2])) for item in found if item[0] == "call"]


def text(found: list[Any]) -> str:
    return "".join(item[1] for item in found if item[0] == "content")


DEEPSEEK = "<｜tool▁calls▁begin｜>{}<｜tool▁calls▁end｜>"
TWO_CALLS = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {WRITTEN}}}\n</tool_call>\n'
    f'<tool_call>\n{{"arguments": {WRITTEN}, "name": "weather"}}\n</tool_call>',
    "llama3_json": f'{{"name": "weather", "parameters": {WRITTEN}}}; {{"name": "weather", "parameters": {WRITTEN}}}',
    "mistral": f'[TOOL_CALLS][{{"name": "weather", "arguments": {WRITTEN}}}, '
    f'{{"name": "weather", "arguments": {json.dumps(WRITTEN)}}}]',
    "deepseek_v3": DEEPSEEK.format(
        "\n".join(
            [
                "<｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n" + WRITTEN + "\n```<｜tool▁call▁end｜>",
            ]
            * 2
        )
    ),
    "deepseek_v31": DEEPSEEK.format(
        ("<｜tool▁call▁begin｜>weather<｜tool▁sep｜>" + WRITTEN + "<｜tool▁call▁end｜>") * 2
    ),
}
GLM = (
    "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>5</arg_value>\n"
    "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>"
)


@pytest.mark.parametrize("family", TWO_CALLS)
def test_calls_are_found_with_the_text_before_them(family: str) -> None:
    before = "" if family == "llama3_json" else "Let me see. "
    found = parse(find_tool_parser(family)(TOOLS), before + TWO_CALLS[family])
    assert calls(found) == [("weather", ARGS), ("weather", ARGS)]
    assert text(found) == before


def test_glm_values_follow_the_tools_schema() -> None:
    found = parse(find_tool_parser("glm45")(TOOLS), "Hm." + GLM * 2)
    assert calls(found) == [("weather", {"city": "5", "days": 3})] * 2
    assert text(found) == "Hm."
    assert calls(parse(find_tool_parser("glm47")(TOOLS), "<tool_call>weather</tool_call>")) == [("weather", {})]


@pytest.mark.parametrize("properties", [["city"], "city", 5, None])
def test_glm_properties_that_are_no_object_count_as_none(properties: Any) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"properties": properties}}}]
    assert calls(parse(find_tool_parser("glm45")(tools), GLM)) == [("weather", {"city": 5, "days": 3})]


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_is_no_json_is_a_string(word: str) -> None:
    written = f"<tool_call>f\n<arg_key>q</arg_key>\n<arg_value>{word}</arg_value>\n</tool_call>"
    assert calls(parse(find_tool_parser("glm45")(), written)) == [("f", {"q": word})]


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("glm45", "<tool_call></tool_call>"),
        (
            "deepseek_v31",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜> <｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
        ),
        ("deepseek_v32", '<｜DSML｜function_calls><｜DSML｜invoke name=""></｜DSML｜invoke></｜DSML｜function_calls>'),
    ],
)
def test_a_call_without_a_name_is_none(name: str, written: str) -> None:
    assert calls(parse(find_tool_parser(name)(), written)) == []


def test_dsml_arguments_say_whether_they_are_strings() -> None:
    tag = "｜DSML｜"
    call = (
        f'<{tag}invoke name="weather">\n<{tag}parameter name="city" string="true">5 "<b>"\n</{tag}parameter>\n'
        f'<{tag}parameter name="days" string="false">[3, 4]</{tag}parameter>\n'
        f'<{tag}parameter name="odd" string="false">no json</{tag}parameter>\n</{tag}invoke>\n'
    )
    none = f'<{tag}invoke name="time">\n</{tag}invoke>\n'
    written = f"Hm.<{tag}function_calls>\n{call}{none}</{tag}function_calls>"
    expected = [("weather", {"city": '5 "<b>"\n', "days": [3, 4], "odd": "no json"}), ("time", {})]
    for pieces in ([written], list(written)):
        found = parse(find_tool_parser("deepseek_v32")(), *pieces)
        assert (calls(found), text(found)) == (expected, "Hm.")


def test_mistral_calls_by_name() -> None:
    parser = find_tool_parser("mistral")(TOOLS)
    found = parse(parser, f"[TOOL_CALLS]weather[ARGS]{WRITTEN}[TOOL_CALLS]weather{WRITTEN}")
    assert calls(found) == [("weather", ARGS)] * 2
    driver = parser.drive()
    events = driver.feed(f"[TOOL_CALLS]weather[CALL_ID]abc123XYZ[ARGS]{WRITTEN}")
    assert events[0] == CallBegins("weather", "abc123XYZ")
    assert len(parser.new_id()) == 9


def test_arguments_stream_while_they_are_written() -> None:
    driver = find_tool_parser("hermes")().drive()
    assert driver.feed('<tool_call>{"name": "weather", "arguments": {"city": "Kö')[0] == CallBegins("weather")
    assert driver.feed("ln") == [Arguments("ln")]
    assert driver.feed('"}}</tool_') == [Arguments('"}')]


@pytest.mark.parametrize("family", TOOL_PARSERS)
@pytest.mark.parametrize(
    "plain", ["Hello.", "", " ", 'a < b, {"x": 1}', "<tool", '{"no": "call"}', "[1, 2]", "{", '{"name": ']
)
def test_text_without_calls_is_content(family: str, plain: str) -> None:
    found = parse(find_tool_parser(family)(TOOLS), plain)
    assert calls(found) == []
    assert text(found) == plain


@pytest.mark.parametrize("family", ["hermes", "mistral"])
def test_what_only_looks_like_a_call_stays_text(family: str) -> None:
    marker = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]"}[family]
    for junk in ('[{"arguments": {}}]', '{"nome": 3}', "[3]", "{nonsense}", '{"name": 5}'):
        found = parse(find_tool_parser(family)(), f"a {marker}{junk} b")
        assert text(found).replace(" ", "").startswith(f"a{marker}{junk[:1]}"), (junk, found)


@pytest.mark.parametrize(
    ("written", "call"),
    [
        (r'{"name": "f", "arguments": "ok \ud83d"}', ("f", "ok \ufffd")),
        (r'{"arguments": "ok \ud83d", "name": "f"}', ("f", "ok \ufffd")),
        (r'{"arguments": {"a": "\ud83d"}, "name": "f"}', ("f", r'{"a": "\ud83d"}')),
        (r'{"name": "f\ud83d", "arguments": {}}', ("f\ufffd", "{}")),
        (r'{"name": "f", "arguments": "\ud83d\ude00"}', ("f", "\U0001f600")),
    ],
)
def test_half_a_surrogate_pair_leaves_a_call_that_can_be_encoded(written: str, call: tuple[str, str]) -> None:
    found = parse(find_tool_parser("hermes")(), f"<tool_call>{written}</tool_call>")
    assert found == [("call", *call)]


DEEP = "[" * 5000 + "]" * 5000


def test_a_call_too_deep_to_read_is_text() -> None:
    written = f'<tool_call>{{"arguments": {DEEP}, "name": "f"}}'
    assert text(parse(find_tool_parser("hermes")(), written)) == written


def test_a_bare_value_too_deep_to_read_is_a_string() -> None:
    written = f"<tool_call>f<arg_key>k</arg_key><arg_value>{DEEP}</arg_value></tool_call>"
    assert calls(parse(find_tool_parser("glm45")(), written)) == [("f", {"k": DEEP})]


ANY_CALL = '{"name": "anything", "parameters": {}}'


@pytest.mark.parametrize("answer", ['{"name": "Alice", "age": 30}', '{"age": 30, "name": "Alice"} and more'])
def test_an_answer_in_json_is_no_call_of_llamas_unless_it_names_a_tool(answer: str) -> None:
    parser = find_tool_parser("llama3_json")(TOOLS)
    assert parse(parser, *answer) == [("content", answer)]
    assert calls(parse(parser, '{"name": "weather"}')) == [("weather", {})]
    assert calls(parse(parser, f"<|python_tag|>{ANY_CALL}")) == [("anything", {})]
    after_a_call = parse(parser, f'{{"name": "weather", "parameters": {{}}}}; {answer}')
    assert (calls(after_a_call), text(after_a_call)) == ([("weather", {})], f"; {answer}")


def test_a_call_that_is_cut_short_keeps_what_it_has() -> None:
    found = parse(find_tool_parser("hermes")(), '<tool_call>{"name": "weather", "arguments": {"city": "K')
    assert found == [("call", "weather", '{"city": "K')]


BROKEN = {
    "hermes": '<tool_call>{"name": "weather", "arguments": }</tool_call> b',
    "hermes twice": '<tool_call>{"name": "weather", "arguments": "\\x", "name": "a"}</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": }',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": }] b',
    "mistral by name": "[TOOL_CALLS]weather[ARGS]}",
    "deepseek_v31": DEEPSEEK.format("<｜tool▁call▁begin｜>weather<｜tool▁sep｜>}<｜tool▁call▁end｜>"),
    "mistral with spaces": "[TOOL_CALLS] [{foo bar}] b",
    "glm45 without a name": "<tool_call> \n</tool_call> b",
    "deepseek_v32": '<｜DSML｜function_calls><｜DSML｜invoke name=""></｜DSML｜invoke></｜DSML｜function_calls>',
    "hermes cut short": '<tool_call>{"name": "weather", "argu',
    "mistral cut short": "[TOOL_CALLS]weather[ARGS]",
    "glm45 cut short": "<tool_call>weather\n<arg_key>city",
    "deepseek_v32 cut short": '<｜DSML｜function_calls><｜DSML｜invoke name="weather"><｜DSML｜parameter name="ci',
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_call_without_arguments_that_can_be_read_is_text_and_no_call(case: str) -> None:
    parser, written = find_tool_parser(case.split()[0])(TOOLS), BROKEN[case]
    expected = written
    for section in (
        "<｜tool▁calls▁begin｜>",
        "<｜tool▁calls▁end｜>",
        "<｜DSML｜function_calls>",
        "</｜DSML｜function_calls>",
    ):
        expected = expected.replace(section, "")
    assert parse(parser, written) == parse(parser, *written) == [("content", expected)]


def test_what_stands_between_a_calls_arguments_and_its_end_is_text() -> None:
    found = parse(find_tool_parser("hermes")(), '<tool_call>{"name": "f", "arguments": {} oops}</tool_call>')
    assert found == [("call", "f", "{}"), ("content", " oops}</tool_call>")]


def test_of_a_list_only_the_call_that_can_not_be_read_is_text() -> None:
    good = '{"name": "a", "arguments": {}}'
    found = parse(find_tool_parser("mistral")(), f"[TOOL_CALLS][{good}, oops] b")
    assert found == [("call", "a", "{}"), ("content", "oops] b")]
    twice = parse(find_tool_parser("mistral")(), f"[TOOL_CALLS][{good}\n[TOOL_CALLS][{good}]")
    assert twice == [("call", "a", "{}"), ("call", "a", "{}")]


def test_a_call_behind_one_that_is_text_is_found() -> None:
    begin, end = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
    written = DEEPSEEK.format(f"{begin}a<｜tool▁sep｜>}}{end}\n{begin}b<｜tool▁sep｜>{{}}{end}")
    found = parse(find_tool_parser("deepseek_v31")(), written)
    assert found == [("content", f"{begin}a<｜tool▁sep｜>}}{end}"), ("call", "b", "{}")]


def test_required_calls() -> None:
    found = parse(RequiredParser(), f'[{{"name": "a", "parameters": {WRITTEN}}}, {{"name": "b", "parameters": {{}}}}]')
    assert calls(found) == [("a", ARGS), ("b", {})]
    assert text(found) == ""
    assert calls(parse(NamedParser("c"), WRITTEN)) == [("c", ARGS)]
    assert parse(NamedParser("c"), "") == [], "the output ended within its reasoning"


@pytest.mark.parametrize(
    ("family", "prompt_end", "output", "thought", "answer"),
    [
        ("qwen3", "", "<think>\nhm\n</think>\n\nyes", "\nhm\n", "\n\nyes"),
        ("qwen3", "<think>\n", "hm</think>yes", "hm", "yes"),
        ("qwen3", "<think>\n\n</think>\n\n", "yes", "", "yes"),
        ("qwen3", "", "yes", "", "yes"),
        ("qwen3", "", "<think>on and on", "on and on", ""),
        ("deepseek_r1", "", "hm</think>yes", "hm", "yes"),
        ("deepseek_r1", "", "<think>hm</think>yes", "hm", "yes"),
        ("deepseek_r1", "", "on and on", "on and on", ""),
        ("deepseek_r1", "</think>", "yes", "", "yes"),
        ("mistral", "", "[THINK]hm[/THINK]yes", "hm", "yes"),
        ("glm45", "", "\n<think>hm</think>yes", "hm", "yes"),
    ],
)
def test_reasoning_is_told_from_the_answer(
    family: str, prompt_end: str, output: str, thought: str, answer: str
) -> None:
    parser = find_reasoning_parser(family)(prompt_end)
    driver = parser.drive()
    events = driver.feed(output) + driver.finish()
    assert "".join(event.text for event in events if isinstance(event, Reasoning)) == thought
    rest = driver.rest
    assert "".join(event.text for event in events if isinstance(event, Content)) + rest == answer


FRAGMENTS = [
    *TWO_CALLS.values(),
    GLM,
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "[ARGS]",
    "<|python_tag|>",
    "<think>",
    "</think>",
    '{"name": "f", "arguments": ',
    '{"name": "f"}',
    '"x\\"y"',
    "{}",
    "[",
    "]",
    "}",
    ",",
    ";",
    " \n",
    "12",
    "text",
    "é",
    "<",
]


@given(st.lists(st.sampled_from(FRAGMENTS), max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_any_cut_of_the_text_gives_the_same_result(fragments: list[str], rng: random.Random) -> None:
    whole = "".join(fragments)
    cuts = sorted(rng.sample(range(len(whole) + 1), rng.randint(0, min(12, len(whole)))))
    pieces = [whole[i:j] for i, j in zip([0, *cuts], [*cuts, len(whole)], strict=True)]
    parsers: list[Any] = [find_tool_parser(name)(TOOLS) for name in TOOL_PARSERS]
    parsers += [find_reasoning_parser(name)("") for name in REASONING_PARSERS] + [RequiredParser(), NamedParser("f")]
    for parser in parsers:
        expected = parse(parser, whole)
        assert parse(parser, *pieces) == expected, type(parser)
        assert parse(parser, *whole) == expected, type(parser)


def test_a_plug_in_is_one_class_in_one_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from baton.frontend.tools.events import Arguments, CallBegins\n"
        "from baton.frontend.tools.parser import ToolParser, content\n"
        "class Mine(ToolParser):\n"
        "    names = ('mine',)\n"
        "    markers = ('!!',)\n"
        "    def parse(self, scan):\n"
        "        while (yield from content(scan, '!!')):\n"
        "            name = yield from scan.text_until('!!')\n"
        "            yield CallBegins(name)\n"
        "            yield Arguments('{}')\n"
    )
    found = parse(find_tool_parser("mine", str(file))(), "x !!f!! y")
    assert found == [("content", "x "), ("call", "f", "{}"), ("content", " y")]


def test_unknown_parsers_and_broken_plug_ins_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="hermes"):
        find_tool_parser("nobody")
    with pytest.raises(UserError, match="qwen3"):
        find_reasoning_parser("nobody")
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    with pytest.raises(UserError, match="ZeroDivisionError"):
        find_tool_parser("mine", str(broken))
    with pytest.raises(UserError, match="not a Python file"):
        find_tool_parser("mine", str(tmp_path / "absent.py"))
