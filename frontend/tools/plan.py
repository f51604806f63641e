"""How a chat request's output will be read: which parsers, and which grammar when a call is required."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from baton.frontend.api.errors import bad_request
from baton.frontend.structured.constraint import Constraint
from baton.frontend.tokenizer import Tokenizer
from baton.frontend.tools.output import OutputParser
from baton.frontend.tools.parser import ReasoningParser, ToolParser
from baton.frontend.tools.registry import find_reasoning_parser, find_tool_parser
from baton.frontend.tools.request import (
    NamedTool,
    Tool,
    ToolChoice,
    check_tools,
    named_constraint,
    required_constraint,
)
from baton.frontend.tools.required import NamedParser, RequiredParser
from baton.proto.config import FrontendConfig

_PROMPT_END_TOKENS = 16
"""Where templates open or close the reasoning."""


class AsksTools(Protocol):
    """A chat request, as far as tools go."""

    tools: list[Tool] | None
    tool_choice: ToolChoice | None
    parallel_tool_calls: bool
    include_reasoning: bool


@dataclass(frozen=True)
class OutputPlan:
    """Of one request."""

    constraint: Constraint | None
    """Set when a tool must be called."""
    new_tool_parser: type[ToolParser] | None
    named: str
    """The tool whose arguments are the whole output."""
    tools: Sequence[dict[str, Any]]
    new_reasoning_parser: type[ReasoningParser] | None
    prompt_end: str
    one_call: bool
    show_reasoning: bool
    keeps_special_tokens: bool
    """A parser looks for special tokens, so that they must stay in the text."""
    ends_with_calls: bool
    """finish_reason says tool_calls; as at OpenAI it does not when the client named the tool."""
    ids: type[ToolParser] | None
    """Makes the ids of calls, as the model's template takes them back; None: it has no wishes."""
    spaced: bool = False
    """The answer is held to a form, and white space may stand before it that belongs to the reasoning."""

    def new_parser(self) -> OutputParser:
        """For one output."""
        tools: ToolParser | None = NamedParser(self.named) if self.named else None
        if self.new_tool_parser is not None:
            tools = self.new_tool_parser(self.tools)
        reasoning = None
        if self.new_reasoning_parser is not None:
            reasoning = self.new_reasoning_parser(self.prompt_end)
        return OutputParser(
            reasoning,
            tools,
            ids=self.ids(self.tools) if self.ids is not None else tools,
            one_call=self.one_call,
            show_reasoning=self.show_reasoning,
            spaced=self.spaced,
        )


class ToolServing:
    """What this server does with tools and reasoning, as its flags say. Raises UserError for unknown parsers."""

    def __init__(self, config: FrontendConfig, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special = {tokenizer.token(id) for id in tokenizer.special_ids}
        self._auto = config.enable_auto_tool_choice
        name, plugin = config.tool_call_parser, config.tool_parser_plugin
        self._tool_parser = find_tool_parser(name, plugin) if name else None
        name = config.reasoning_parser
        self._reasoning_parser = find_reasoning_parser(name, plugin) if name else None

    def plan(
        self, request: AsksTools, raw_tools: Sequence[dict[str, Any]], prompt_ids: np.ndarray
    ) -> OutputPlan | None:
        """For this request, whose prompt is int32 [n]; None when its output is all content. Raises ApiError."""
        choice = check_tools(request.tools, request.tool_choice)
        tools = request.tools or []
        constraint: Constraint | None = None
        new_parser: type[ToolParser] | None = None
        if isinstance(choice, NamedTool):
            constraint = named_constraint(tools, choice.function.name)
        elif choice == "required":
            constraint = required_constraint(tools, request.parallel_tool_calls)
            new_parser = RequiredParser
        elif choice == "auto":
            new_parser = self._auto_parser()
        if new_parser is None and constraint is None and self._reasoning_parser is None:
            return None
        markers = {*(new_parser.markers if new_parser else ())}
        markers |= {*(self._reasoning_parser.markers if self._reasoning_parser else ())}
        return OutputPlan(
            constraint=constraint,
            new_tool_parser=new_parser,
            named=choice.function.name if isinstance(choice, NamedTool) else "",
            tools=raw_tools,
            new_reasoning_parser=self._reasoning_parser,
            prompt_end=self._tokenizer.decode(prompt_ids[-_PROMPT_END_TOKENS:].tolist(), skip_special_tokens=False),
            one_call=not request.parallel_tool_calls,
            show_reasoning=request.include_reasoning,
            keeps_special_tokens=bool(markers & self._special),
            ends_with_calls=new_parser is not None,
            ids=self._tool_parser,
        )

    def before_answer(self, plan: OutputPlan) -> str:
        """Lark rules of the reasoning that may stand before a constrained answer; see Grammars.make."""
        if plan.new_reasoning_parser is None:
            return ""
        parser = plan.new_reasoning_parser(plan.prompt_end)
        if parser.closed:
            return ""
        start, thought = self._marker(parser.start), self._up_to(parser.end)
        before = f"{start}? thought" if parser.open else f"({start} thought)?"
        return f"before: {before} SPACE\n{thought}\nSPACE: /[ \\n]{{0,4}}/"

    def _auto_parser(self) -> type[ToolParser]:
        if not self._auto or self._tool_parser is None:
            raise bad_request(
                '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set; '
                "tool_choice required, or one that names a tool, works without them.",
                "tool_choice",
            )
        return self._tool_parser

    def _marker(self, text: str) -> str:
        return f"<[{self._tokenizer.id_of(text)}]>" if text in self._special else f'"{text}"'

    def _up_to(self, end: str) -> str:
        """Special tokens are no text to the grammar, so that a lazy pattern is for the others alone."""
        if end in self._special:
            return f"thought: /(.|\\n)*/ {self._marker(end)}"
        return f"thought[lazy]: /(.|\\n)*{re.escape(end).replace('/', chr(92) + '/')}/"
