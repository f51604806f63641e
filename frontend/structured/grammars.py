"""Constraints to grammars that workers compile: made, tried and kept here, in a thread of their own.

A constraint that can't be enforced is refused before anything is generated. Grammars are in llguidance's JSON form.
"""

import asyncio
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import msgspec

from baton.frontend.api.errors import ApiError, bad_request
from baton.frontend.model_info import ModelInfo
from baton.frontend.structured.constraint import Constraint, Kind
from baton.frontend.tokenizer import Tokenizer
from baton.proto.grammar import MAX_GRAMMAR_BYTES, GrammarError, grammar_tokenizer, new_matcher

if TYPE_CHECKING:
    from llguidance import LLTokenizer

MAX_KEPT = 128
WHITESPACE = r"[ \t\n\r]{1,20}"
"""Between JSON tokens: enough for a line break and indentation, too little for a model to lose itself in."""
_ESCAPES = '"\\bfnrt'
"""Each character of a string can be written in one way only, else an escaped name would evade its property's schema."""
_MESSAGE_CHARS = 500
_KEYWORDS = (
    ("Unknown format", "format"),
    ("Invalid type", "type"),
    ("oneOf", "oneOf"),
    ("Pointer", "$ref"),
    ("Resource", "$ref"),
    ("regexes", "patternProperties"),
    ("regex parse error", "pattern"),
)
"""Parts of the compiler's messages that do not name the keyword themselves."""
_BODY = "body"


class Grammars:
    """Constraints of one model's outputs. Owns a thread; close() ends it."""

    def __init__(self, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self._tokenizer, self._info = tokenizer, info
        self._vocabulary: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[Constraint, str], str] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def get(self, constraint: Constraint, before: str = "") -> str:
        """As `make`, in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self.make, constraint, before)

    def make(self, constraint: Constraint, before: str = "") -> str:
        """The grammar of an output of this form. `before`: Lark that defines the rule `before`, of what comes first.

        Raises ApiError (400) when it can't be enforced; for a schema the message names the keyword.
        """
        grammar = self._kept.get((constraint, before))
        if grammar is None:
            try:
                grammar = self._make(constraint, before)
            except (GrammarError, ValueError, RecursionError) as error:
                raise _refusal(constraint, str(error)) from error
            self._kept[constraint, before] = grammar
            if len(self._kept) > MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end((constraint, before))
        return grammar

    def close(self) -> None:
        """End after what is being made."""
        self._thread.shutdown(cancel_futures=True)

    def _make(self, constraint: Constraint, before: str) -> str:
        if not self._info.eos_ids:
            raise GrammarError("this model has no end token, without which a constrained output could not end")
        if len(constraint.text) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it is longer than {MAX_GRAMMAR_BYTES} bytes")
        body = msgspec.json.decode(_BUILDERS[constraint.kind](constraint))["grammars"]
        if before:
            body[0]["name"] = _BODY
            body = [{"lark_grammar": f"start: before @{_BODY}\n{before}\n"}, *body]
        grammar = msgspec.json.encode({"grammars": body}).decode()
        self._try(grammar)
        return grammar

    def _try(self, grammar: str) -> None:
        """Compile it and take its first mask, which finds what is too complex or allows nothing."""
        if self._vocabulary is None:
            self._vocabulary = grammar_tokenizer(self._tokenizer.backend, self._info.vocab_size)
        matcher = new_matcher(self._vocabulary, grammar)
        allowed = matcher.compute_bitmask()
        if matcher.is_error():
            raise GrammarError(f"it is too complex: {matcher.get_error()}")
        if not any(allowed):
            raise GrammarError("no output could satisfy it")


def _of_json(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    schema = msgspec.json.decode(constraint.text)
    if schema is False:
        raise GrammarError("no output could satisfy the schema false")
    schema = {} if schema is True else schema
    _check_counts(schema)
    whitespace = WHITESPACE if constraint.whitespace is None else constraint.whitespace
    options: dict[str, Any] = {
        "whitespace_flexible": bool(whitespace),
        "lenient": False,
        "coerce_one_of": False,
        "json_allowed_escapes": _ESCAPES,
    }
    if whitespace:
        options["whitespace_pattern"] = whitespace
    return LLMatcher.grammar_from_json_schema(schema, overrides=options)  # type: ignore[arg-type]


def _check_counts(schema: Any) -> None:
    """A grammar can't tell whether two names of an open object are the same, so that it can't count them."""
    if isinstance(schema, list):
        for item in schema:
            _check_counts(item)
    if isinstance(schema, dict):
        least, required = schema.get("minProperties"), schema.get("required")
        num_required = len(required) if isinstance(required, list) else 0
        if isinstance(least, int) and least > max(num_required, 1):
            raise GrammarError("minProperties can be enforced up to the number of required properties")
        for value in schema.values():
            _check_counts(value)


def _of_regex(constraint: Constraint) -> str:
    from llguidance import LLMatcher

    return _lark(LLMatcher.grammar_from_regex(constraint.text))


def _of_choice(constraint: Constraint) -> str:
    return _lark("start: " + " | ".join(msgspec.json.encode(text).decode() for text in _strings(constraint.text)))


def _of_grammar(constraint: Constraint) -> str:
    from llguidance import grammar_from

    return _lark(grammar_from("grammar", constraint.text))


_BUILDERS: Mapping[Kind, Callable[[Constraint], str]] = {
    Kind.JSON: _of_json,
    Kind.REGEX: _of_regex,
    Kind.CHOICE: _of_choice,
    Kind.GRAMMAR: _of_grammar,
}


def _strings(text: str) -> list[str]:
    return msgspec.json.decode(text, type=list[str])


def _lark(grammar: str) -> str:
    """As JSON, which some of llguidance's converters give already."""
    if grammar.startswith('{"grammars"'):
        return grammar
    return msgspec.json.encode({"grammars": [{"lark_grammar": grammar}]}).decode()


def _refusal(constraint: Constraint, message: str) -> ApiError:
    message = re.split(r"\n?<state>", message)[0].strip()
    if constraint.kind is Kind.JSON:
        keyword = next((name for part, name in _KEYWORDS if part in message), None)
        message = f"{keyword}: {message}" if keyword else message
    return bad_request(
        f"{constraint.param} can't be enforced: {message[:_MESSAGE_CHARS]}", constraint.param, "unsupported_grammar"
    )
