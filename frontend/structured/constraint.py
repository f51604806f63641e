"""What a client says about the form of its output, in every place where OpenAI's and vLLM's clients say it."""

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated, Any, Protocol

import msgspec
from msgspec import Meta

from baton.frontend.api.errors import bad_request
from baton.proto.grammar import MAX_GRAMMAR_BYTES

Schema = dict[str, Any] | bool


class Kind(StrEnum):
    """How a constraint is written down."""

    JSON = "json"
    REGEX = "regex"
    CHOICE = "choice"
    GRAMMAR = "grammar"


@dataclass(frozen=True)
class Constraint:
    """The form of an output."""

    kind: Kind
    text: str
    """The schema as JSON, the pattern, a JSON list of strings, or the grammar."""
    param: str
    """The field of the request that it comes from, for errors."""
    whitespace: str | None = None
    """Pattern of the whitespace between JSON tokens; empty: none, None: the server's."""


class JsonSchemaFormat(msgspec.Struct, kw_only=True):
    """OpenAI's json_schema. Output is always held to the schema, whatever `strict` says."""

    name: str
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, kw_only=True):
    """OpenAI's response_format."""

    type: Annotated[str, Meta(description="text, json_object or json_schema")]
    json_schema: JsonSchemaFormat | None = None


class StructuredOutputs(msgspec.Struct, kw_only=True):
    """vLLM's structured_outputs: one of json, regex, choice, grammar and json_object."""

    json: str | Schema | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: Annotated[str | None, Meta(description="Lark, as llguidance reads it, or GBNF")] = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None
    structural_tag: str | None = None


class Asks(Protocol):
    """A request that may constrain its output."""

    response_format: ResponseFormat | None
    structured_outputs: StructuredOutputs | None
    guided_json: str | Schema | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    guided_whitespace_pattern: str | None


def read_constraint(request: Asks) -> Constraint | None:
    """What the request asks for, None for free text. Raises ApiError naming the field."""
    older = StructuredOutputs(
        json=request.guided_json,
        regex=request.guided_regex,
        choice=request.guided_choice,
        grammar=request.guided_grammar,
        whitespace_pattern=request.guided_whitespace_pattern,
    )
    found = [
        *_of_response_format(request.response_format),
        *_of_structured_outputs(request.structured_outputs or StructuredOutputs(), "structured_outputs."),
        *_of_structured_outputs(older, "guided_"),
    ]
    if len(found) > 1:
        names = ", ".join(constraint.param for constraint in found)
        raise bad_request(f"the output can have one form only, got several: {names}.", found[1].param)
    return found[0] if found else None


def schema_constraint(schema: Schema, param: str, whitespace: str | None = None) -> Constraint:
    """JSON that satisfies `schema`."""
    return Constraint(Kind.JSON, _schema_text(schema, param), param, whitespace)


def _of_response_format(format: ResponseFormat | None) -> list[Constraint]:
    match format:
        case None | ResponseFormat(type="text"):
            return []
        case ResponseFormat(type="json_object"):
            return [schema_constraint({"type": "object"}, "response_format")]
        case ResponseFormat(type="json_schema", json_schema=None):
            raise bad_request("response_format of type json_schema needs the field json_schema.", "response_format")
        case ResponseFormat(type="json_schema", json_schema=JsonSchemaFormat(schema=schema)):
            return [schema_constraint(True if schema is None else schema, "response_format")]
    raise bad_request(
        f"response_format has the type {format.type!r}; possible are text, json_object and json_schema.",
        "response_format",
    )


def _of_structured_outputs(given: StructuredOutputs, prefix: str) -> list[Constraint]:
    if given.structural_tag is not None:
        raise bad_request("structural_tag is not supported; give json, regex, choice or grammar.", "structured_outputs")
    whitespace = "" if given.disable_any_whitespace else given.whitespace_pattern
    found = []
    if given.json is not None:
        schema = _schema(given.json, f"{prefix}json")
        if given.disable_additional_properties:
            _schema_text(schema, f"{prefix}json")
            schema = _closed(schema)
        found.append(schema_constraint(schema, f"{prefix}json", whitespace))
    if given.json_object:
        found.append(schema_constraint({"type": "object"}, f"{prefix}json_object", whitespace))
    if given.regex is not None:
        found.append(Constraint(Kind.REGEX, given.regex, f"{prefix}regex"))
    if given.choice is not None:
        if not given.choice or "" in given.choice:
            raise bad_request(f"{prefix}choice must be a list of strings that are not empty.", f"{prefix}choice")
        found.append(Constraint(Kind.CHOICE, msgspec.json.encode(given.choice).decode(), f"{prefix}choice"))
    if given.grammar is not None:
        found.append(Constraint(Kind.GRAMMAR, given.grammar, f"{prefix}grammar"))
    return found


def _schema(given: str | Schema, param: str) -> Schema:
    if not isinstance(given, str):
        return given
    try:
        return msgspec.json.decode(given, type=Schema)
    except (msgspec.DecodeError, RecursionError) as error:
        raise bad_request(f"{param} is a string, but not a JSON schema: {error}", param) from error


def _schema_text(schema: Schema, param: str) -> str:
    """As JSON. Raises ApiError for one that is too long to be a grammar."""
    text = msgspec.json.encode(schema)
    if len(text) > MAX_GRAMMAR_BYTES:
        raise bad_request(f"{param} is longer than {MAX_GRAMMAR_BYTES} bytes", param, "unsupported_grammar")
    return text.decode()


def _closed(schema: Any) -> Any:
    """The schema without properties that it does not name."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if "properties" in schema or schema.get("type") == "object":
        closed.setdefault("additionalProperties", False)
    return closed
