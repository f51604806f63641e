"""Chat messages to prompt text, by the jinja2 template that comes with a model. Conventions are those of transformers.

Templates come from checkpoints, so they run in jinja2's immutable sandbox.
"""

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from baton.frontend.tokenizer import Tokenizer
from baton.proto.config import ModelConfig
from baton.proto.errors import UserError

Message = dict[str, Any]


class ChatTemplateError(Exception):
    """The messages do not suit the template; the text is for the client."""


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks the assistant's tokens for training; here its content stands as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str, special_tokens: dict[str, str]) -> None:
        """`special_tokens`: bos_token, eos_token, … as the template may write them. Raises UserError."""
        environment = _environment()
        try:
            tree = environment.parse(source)
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template does not compile: {error}") from error
        self._special_tokens = special_tokens
        self._wants_parts = _iterates_content(tree)
        self._knows_developer = "developer" in source

    def render(
        self, messages: list[Message], *, add_generation_prompt: bool = True, variables: dict[str, Any] | None = None
    ) -> str:
        """The prompt. Content parts must be text. Raises ChatTemplateError with the template's own complaint."""
        shaped = [self._shape(message) for message in messages]
        names = (variables or {}) | {"messages": shaped, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(self._special_tokens | names)
        except ChatTemplateError:
            raise
        except Exception as error:  # a template can raise whatever its expressions raise
            raise ChatTemplateError(f"the chat template could not render these messages: {error}") from error

    def _shape(self, message: Message) -> Message:
        message = dict(message)
        if message.get("role") == "developer" and not self._knows_developer:
            message["role"] = "system"
        content = message.get("content")
        if content is None:
            message["content"] = ""
        elif self._wants_parts:
            texts = [content] if isinstance(content, str) else [part["text"] for part in content]
            message["content"] = [{"type": "text", "text": text} for text in texts]
        elif isinstance(content, list):
            message["content"] = "\n".join(part["text"] for part in content)
        return message


def load_chat_template(config: ModelConfig, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template of the configuration, else the tokenizer's, else None. Raises UserError."""
    if config.chat_template:
        try:
            source = Path(config.chat_template).read_text()
        except OSError as error:
            raise UserError(f"cannot read the chat template {config.chat_template}: {error.strerror}") from error
        return ChatTemplate(source, tokenizer.special_tokens)
    templates = tokenizer.config.get("chat_template")
    if isinstance(templates, list):  # several, by name
        templates = {entry["name"]: entry["template"] for entry in templates}.get("default")
    return ChatTemplate(templates, tokenizer.special_tokens) if templates else None


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """Unlike jinja2's own, this one does not escape HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _raise_exception(message: str) -> None:
    raise ChatTemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _iterates_content(tree: jinja2.nodes.Template) -> bool:
    """Whether the template loops over a message's content, and so expects a list of parts where there is one."""
    for loop in tree.find_all(jinja2.nodes.For):
        match loop.iter:
            case jinja2.nodes.Getitem(arg=jinja2.nodes.Const(value="content")) | jinja2.nodes.Getattr(attr="content"):
                return True
    return False
