"""Reasoning between a pair of markers, which stand in the output or, the first one, at the end of the prompt."""

from typing import ClassVar

from baton.frontend.tools.events import Content
from baton.frontend.tools.parser import ReasoningParser, reasoning
from baton.frontend.tools.scanner import Finds, Scanner


class ThinkParser(ReasoningParser):
    """`<think>…</think>`, as Qwen 3, GLM and DeepSeek since V3.1 write it."""

    names: ClassVar[tuple[str, ...]] = ("qwen3", "glm45", "deepseek_v3", "deepseek_v31")
    markers = ("<think>", "</think>")

    def parse(self, scan: Scanner) -> Finds[None]:
        if self.closed:
            return
        space = yield from scan.take_space()
        if (yield from scan.starts_with(self.start)):
            scan.take(len(self.start))
        elif not self.open:
            if space:
                yield Content(space)
            return
        yield from reasoning(scan, self.end)


class DeepSeekR1Parser(ThinkParser):
    """Reasons from the first token on, whether or not anything says so."""

    names: ClassVar[tuple[str, ...]] = ("deepseek_r1",)
    always = True


class MistralThinkParser(ThinkParser):
    """`[THINK]…[/THINK]`"""

    names: ClassVar[tuple[str, ...]] = ("mistral",)
    start, end = "[THINK]", "[/THINK]"
    markers = ("[THINK]", "[/THINK]")
