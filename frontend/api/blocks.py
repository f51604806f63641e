"""An answer as a sequence of blocks (text, reasoning, calls) that begin, grow and end one after the other.

This is how the newer APIs tell an answer. Where one delta ends and the next begins makes no difference to the blocks.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum

from baton.frontend.api.choice import Delta, Tokens
from baton.frontend.tools.events import Content, Reasoning
from baton.frontend.tools.output import CallPart
from baton.proto.messages import TokenLogprobs


class Kind(Enum):
    """What a block holds."""

    TEXT = "text"
    REASONING = "reasoning"
    CALL = "call"


Logprobs = list[tuple[int, TokenLogprobs]]
"""Sampled token id and what was asked for about it."""


@dataclass(eq=False)
class Block:
    """One of them."""

    kind: Kind
    index: int
    name: str = ""
    """Of the tool, in a call."""
    call_id: str = ""
    parts: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """The text, the reasoning, or a call's arguments as JSON."""
        return "".join(self.parts)


@dataclass(frozen=True)
class Begins:
    """A block that is empty yet."""

    block: Block


@dataclass(frozen=True)
class Grows:
    """More of the block that began last."""

    block: Block
    text: str
    logprobs: Logprobs
    """Of a text's tokens, when asked for."""


@dataclass(frozen=True)
class Ends:
    """The block is complete."""

    block: Block


Change = Begins | Grows | Ends


class Blocks:
    """Follows one answer."""

    def __init__(self) -> None:
        self._count = 0
        self._open: Block | None = None
        self._space = ""
        """White space that belongs to a text if one follows."""
        self._logprobs: Logprobs = []
        """Of tokens whose text has not come yet."""

    def take(self, delta: Delta) -> Iterator[Change]:
        """What a delta changes."""
        for piece in delta.in_order:
            match piece:
                case Tokens(ids, logprobs, behind_marker):
                    waiting = [] if behind_marker else self._logprobs
                    self._logprobs = [*waiting, *zip(ids, logprobs, strict=True)]
                case Content(text):
                    yield from self._text(text)
                case Reasoning(text):
                    yield from self._other(Kind.REASONING, text)
                case CallPart(name=name, id=id, arguments=arguments):
                    yield from self._other(Kind.CALL, arguments, name, id)

    def end(self) -> Iterator[Change]:
        """No more deltas come. White space that is the whole answer is one."""
        if self._space and not self._count:
            yield from self._begin(Kind.TEXT)
            yield from self._grow(self._space)
        yield from self._close()

    def _text(self, text: str) -> Iterator[Change]:
        if self._open is None or self._open.kind is not Kind.TEXT:
            self._space += text
            if not self._space.strip():
                return
            text = self._space
            yield from self._begin(Kind.TEXT)
        yield from self._grow(text)

    def _other(self, kind: Kind, text: str, name: str = "", call_id: str = "") -> Iterator[Change]:
        """Reasoning, or a call, which begins where it has a name."""
        if name or self._open is None or self._open.kind is not kind:
            yield from self._begin(kind, name, call_id)
        self._logprobs = []
        if text:
            yield from self._grow(text)

    def _begin(self, kind: Kind, name: str = "", call_id: str = "") -> Iterator[Change]:
        yield from self._close()
        self._space = ""
        self._open = Block(kind, self._count, name, call_id)
        self._count += 1
        yield Begins(self._open)

    def _grow(self, text: str) -> Iterator[Change]:
        assert self._open is not None
        logprobs, self._logprobs = self._logprobs, []
        self._open.parts.append(text)
        yield Grows(self._open, text, logprobs)

    def _close(self) -> Iterator[Change]:
        block, self._open = self._open, None
        if block is not None:
            yield Ends(block)
