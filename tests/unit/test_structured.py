"""What clients may ask of an output's form, and what is refused with which words."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from baton.frontend.api.errors import ApiError
from baton.frontend.api.params import read_wishes
from baton.frontend.api.requests import CompletionRequest, parse
from baton.frontend.model_info import ModelInfo, SamplingDefaults
from baton.frontend.structured.constraint import Constraint, Kind, read_constraint, schema_constraint
from baton.frontend.structured.grammars import MAX_KEPT, Grammars
from baton.frontend.tokenizer import Tokenizer
from baton.proto.grammar import MAX_GRAMMAR_BYTES, grammar_tokenizer, new_matcher

EOS = 256
INFO = ModelInfo(("m",), 1000, 300, (EOS,), SamplingDefaults())


def byte_tokenizer() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(
        models.BPE({char: id for id, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<eos>"])
    return backend


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    grammars = Grammars(Tokenizer(byte_tokenizer(), {"eos_token": "<eos>"}), INFO)
    yield grammars
    grammars.close()


VOCABULARY = grammar_tokenizer(byte_tokenizer(), 300)


def request(**fields: Any) -> CompletionRequest:
    return parse(json.dumps({"prompt": "x", **fields}).encode(), CompletionRequest)[0]


def constraint_of(**fields: Any) -> Constraint:
    constraint = read_constraint(request(**fields))
    assert constraint is not None
    return constraint


def matches(grammar: str, text: str) -> bool:
    matcher = new_matcher(VOCABULARY, grammar)
    tokens = VOCABULARY.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}}},
        {"structured_outputs": {"json": SCHEMA}},
        {"structured_outputs": {"json": json.dumps(SCHEMA)}},
        {"guided_json": SCHEMA},
    ],
)
def test_a_schema_is_found_wherever_clients_put_it(grammars: Grammars, fields: dict[str, Any]) -> None:
    grammar = grammars.make(constraint_of(**fields))
    assert matches(grammar, '{"a": 1}')
    assert not matches(grammar, '{"a": "1"}')


@pytest.mark.parametrize(
    ("fields", "good", "bad"),
    [
        ({"response_format": {"type": "json_object"}}, '{"x": [1, null]}', "[1]"),
        ({"structured_outputs": {"json_object": True}}, "{}", "5"),
        ({"structured_outputs": {"regex": r"\d{3}-\d{4}"}}, "123-4567", "123-456"),
        ({"guided_regex": "a|b"}, "b", "ab"),
        ({"structured_outputs": {"choice": ['say "yes"', "näin\n"]}}, 'say "yes"', "say"),
        ({"guided_choice": ["yes", "no"]}, "no", "maybe"),
        ({"structured_outputs": {"grammar": 'root ::= "a" digit+\ndigit ::= [0-9]'}}, "a12", "a"),
        ({"guided_grammar": 'start: "a" DIGIT+\nDIGIT: /[0-9]/'}, "a12", "a"),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, '{"a":1}', '{"a": 1}'),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " "}}, '{"a": 1}', '{"a":\n1}'),
        ({"structured_outputs": {"json": SCHEMA, "disable_additional_properties": True}}, '{"a":1}', '{"a":1,"b":2}'),
    ],
)
def test_every_kind_of_form(grammars: Grammars, fields: dict[str, Any], good: str, bad: str) -> None:
    grammar = grammars.make(constraint_of(**fields))
    assert matches(grammar, good)
    assert not matches(grammar, bad)


def test_text_is_no_form() -> None:
    assert read_constraint(request(response_format={"type": "text"})) is None
    assert read_constraint(request()) is None


def test_whitespace_is_bounded(grammars: Grammars) -> None:
    grammar = grammars.make(schema_constraint(SCHEMA, "p"))
    assert matches(grammar, '{\n    "a": 1\n}')
    assert not matches(grammar, '{"a":' + " " * 21 + "1}")


def test_an_escaped_name_can_not_evade_its_property(grammars: Grammars) -> None:
    grammar = grammars.make(schema_constraint({"type": "object", "properties": {"a/": {"type": "integer"}}}, "p"))
    for name in ("\\u0061/", "a\\/"):
        assert not matches(grammar, f'{{"{name}": "x"}}')


@pytest.mark.parametrize(
    ("schema", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"not": {"type": "string"}}, "not"),
        ({"if": {}, "then": {}}, "if"),
        ({"type": "object", "propertyNames": {"pattern": "a"}}, "propertyNames"),
        ({"type": "object", "dependentRequired": {"a": ["b"]}}, "dependentRequired"),
        ({"type": "string", "format": "shoe-size"}, "format"),
        ({"type": "string", "pattern": "(?=a)b"}, "pattern"),
        ({"type": "shoe"}, "type"),
        ({"oneOf": [{"type": "string"}, {"minLength": 3}]}, "oneOf"),
        ({"$ref": "#/nowhere"}, "$ref"),
        ({"$ref": "http://example.com/schema.json"}, "$ref"),
        ({"type": "integer", "minimum": 5, "maximum": 3}, "minimum"),
        ({"type": "object", "minProperties": 2}, "minProperties"),
        ({"type": "object", "minProperties": 2, "required": 5}, "minProperties"),
        ({"type": "object", "minProperties": 1, "required": 5}, "required"),
        ({"type": "object", "patternProperties": {"^a": {}, "b$": {}}}, "patternProperties"),
        ({"type": "string", "minLength": "2"}, "minLength"),
        ({"x-guidance": {"lenient": True}, "type": "array", "uniqueItems": True}, "uniqueItems"),
    ],
)
def test_a_schema_that_can_not_be_enforced_is_refused_by_keyword(
    grammars: Grammars, schema: dict[str, Any], keyword: str
) -> None:
    fields = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    with pytest.raises(ApiError) as caught:
        grammars.make(constraint_of(**fields))
    error = caught.value.body.error
    assert (caught.value.status, error.param) == (400, "response_format")
    assert keyword in error.message
    assert "x-guidance" not in error.message
    assert len(error.message) < 1000


@pytest.mark.parametrize(
    "constraint",
    [
        Constraint(Kind.REGEX, "(", "p"),
        Constraint(Kind.GRAMMAR, "start: nothing", "p"),
        Constraint(Kind.GRAMMAR, "", "p"),
        Constraint(Kind.JSON, "false", "p"),
        Constraint(Kind.JSON, '{"items": ' * 2000 + "{}" + "}" * 2000, "p"),
        Constraint(Kind.JSON, json.dumps({"const": "x" * MAX_GRAMMAR_BYTES}), "p"),
    ],
)
def test_what_is_wrong_or_too_complex_is_a_400(grammars: Grammars, constraint: Constraint) -> None:
    with pytest.raises(ApiError) as caught:
        grammars.make(constraint)
    assert caught.value.status == 400
    assert caught.value.body.error.message.startswith("p can't be enforced: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"structured_outputs": {"choice": []}},
        {"structured_outputs": {"json": "{"}},
        {"structured_outputs": {"structural_tag": "{}"}},
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"guided_json": {}, "guided_regex": "a"},
    ],
)
def test_requests_that_contradict_themselves_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ApiError) as caught:
        read_constraint(request(**fields))
    assert caught.value.status == 400


def test_what_comes_before_is_free_until_its_end(grammars: Grammars) -> None:
    grammar = grammars.make(schema_constraint({"type": "integer"}, "p"), "before[lazy]: /(.|\\n)*<\\/t>/")
    assert matches(grammar, "hm\n</t>12")
    assert not matches(grammar, "hm 12")


def test_the_end_token_ends_a_constrained_output_even_when_it_is_to_be_ignored() -> None:
    wishes = read_wishes(request(ignore_eos=True, stop_token_ids=[7]), INFO, 5)
    assert wishes.sampling.stop_token_ids == (7,)
    assert wishes.constrained("g", INFO).sampling.stop_token_ids == (7, EOS)


def test_grammars_are_kept_up_to_a_bound(grammars: Grammars) -> None:
    constraints = [Constraint(Kind.REGEX, f"a{{{n}}}", "p") for n in range(1, MAX_KEPT + 10)]
    first = grammars.make(constraints[0])
    assert grammars.make(constraints[0]) is first
    for constraint in constraints:
        grammars.make(constraint)
    assert grammars.make(constraints[0]) is not first
