"""One output stream as the client sees it: text, tokens and the reason of its end, in deltas."""

from collections.abc import Iterator
from typing import Protocol

import msgspec

from baton.frontend.api.errors import outcome_error
from baton.frontend.api.params import Wishes
from baton.frontend.api.prompts import Prompt
from baton.frontend.detokenizer import PROMPT_END_TOKENS, Detokenizer
from baton.frontend.engine_client import Output
from baton.frontend.instructions import Finished
from baton.frontend.tokenizer import Tokenizer
from baton.frontend.tools.events import Content, Reasoning
from baton.frontend.tools.output import CallPart, OutputParser, Piece
from baton.frontend.tools.plan import OutputPlan
from baton.proto.lifecycle import Outcome
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import Ledger, SamplingParams, TokenLogprobs

TOOL_CALLS = "tool_calls"
"""finish_reason of an answer that calls tools."""


class Stopper(Protocol):
    """Can end a stream from the reader's side."""

    def stop(self, index: int) -> Finished | None:
        """End it now; None when it was over."""


class Tokens(msgspec.Struct, frozen=True, gc=False):
    """Tokens that were sampled, with what was asked for about them."""

    ids: list[int]
    logprobs: list[TokenLogprobs]
    behind_marker: bool = False
    """With them a marker ended: those that waited before them spelt it."""


class Delta(msgspec.Struct, gc=False):
    """A piece of the output."""

    text: str = ""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    """One per token when asked for, else empty."""
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string or token id that ended the text; None for the tokenizer's end token."""
    reasoning: str = ""
    calls: list[CallPart] = []
    pieces: list[Piece | Tokens] = []
    """Text, reasoning and calls in the order in which they were written, tokens with logprobs before what they bring;
    empty when all of it is text."""

    @property
    def in_order(self) -> "list[Piece | Tokens]":
        """As `pieces`, also when all is text."""
        if self.pieces:
            return self.pieces
        text: list[Piece | Tokens] = [Content(self.text)] if self.text else []
        return [Tokens(self.token_ids, self.logprobs), *text] if self.logprobs else text

    @property
    def brings(self) -> bool:
        """Whether it has something for a client that does not look at tokens."""
        return bool(self.text or self.finish_reason or self.reasoning or self.calls)

    def extend(self, other: "Delta") -> None:
        """Append what came next."""
        self.text += other.text
        self.reasoning += other.reasoning
        self.calls += other.calls
        self.pieces += other.pieces
        self.token_ids += other.token_ids
        self.logprobs += other.logprobs
        self.finish_reason, self.stop_reason = other.finish_reason, other.stop_reason


class Choice:
    """Turns one stream's tokens into deltas."""

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        params: SamplingParams,
        wishes: Wishes,
        tokenizer: Tokenizer,
        plan: OutputPlan | None = None,
    ) -> None:
        """`plan`: how the text of a chat answer is read; None: it is all content."""
        self.index = index
        self.prompt = prompt
        self.num_tokens = 0
        """Output tokens so far, up to and with the one that completed a stop string."""
        self.reasoning_tokens = 0
        """Those of them up to the end of the reasoning."""
        self.ledger = Ledger()
        """Complete once the stream has finished."""
        self.prompt_logprobs: PromptLogprobs | None = None
        """There with the first tokens, when asked for."""
        self._plan = plan
        self._parser = None if plan is None else plan.new_parser()
        self._wishes = wishes
        self._stop_ids = frozenset(params.stop_token_ids)
        self._detokenizer = Detokenizer(
            tokenizer,
            prompt_end=prompt.ids[-PROMPT_END_TOKENS:].tolist(),
            skip_special_tokens=wishes.skip_special_tokens,
            spaces_between_special_tokens=wishes.spaces_between_special_tokens,
            stop=wishes.stop,
            include_stop=wishes.include_stop,
            min_tokens=params.min_tokens,
        )

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that were not computed."""
        return min(self.ledger.cached_tokens, len(self.prompt.ids))

    def take(self, output: Output, reader: Stopper) -> Delta:
        """What `output` adds; ends the stream at a stop string. Raises ApiError when the stream failed."""
        self.prompt_logprobs = self.prompt_logprobs or output.prompt_logprobs
        if self._parser is None:
            return self._detokenise(output, reader, output.finished)
        whole = Delta()
        for part in self._parts(self._parser, output):
            whole.extend(self._read(self._parser, self._detokenise(part, reader, output.finished)))
            if self._detokenizer.stopped is not None:
                break
        return whole

    def _parts(self, parser: OutputParser, output: Output) -> Iterator[Output]:
        """Token by token where it matters what each of them brings, as one piece otherwise."""
        tokens, logprobs = output.tokens, output.logprobs
        while len(tokens) > 1 and (parser.may_reason or logprobs):
            yield Output(tokens[:1], logprobs[:1])
            tokens, logprobs = tokens[1:], logprobs[1:]
        yield Output(tokens, logprobs, output.finished)

    def _read(self, parser: OutputParser, delta: Delta) -> Delta:
        """Tell content, reasoning and calls apart."""
        assert self._plan is not None
        may_reason = parser.may_reason
        come = parser.held + len(delta.text)
        pieces = parser.feed(delta.text)
        if delta.finish_reason is not None:
            pieces += parser.finish()
        if may_reason and parser.has_reasoned:
            self.reasoning_tokens = self.num_tokens
        delta.text = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        delta.reasoning = "".join(piece.text for piece in pieces if isinstance(piece, Reasoning))
        delta.calls = [piece for piece in pieces if isinstance(piece, CallPart)]
        delta.pieces = [*pieces]
        if delta.logprobs:
            marker = come > parser.held + len(delta.text) + len(delta.reasoning)
            spelt = marker and not pieces and not parser.held  # to its end, and nothing behind it
            delta.pieces.insert(0, Tokens([], [], True) if spelt else Tokens(delta.token_ids, delta.logprobs, marker))
        if delta.finish_reason == Outcome.STOP and parser.num_calls and self._plan.ends_with_calls:
            delta.finish_reason = TOOL_CALLS
        return delta

    def _detokenise(self, output: Output, reader: Stopper, end: Finished | None) -> Delta:
        """What `output` adds, before its text is read. `end`: the stream's, where it is known already."""
        tokens, finished = output.tokens, output.finished
        if self._wishes.prompt_only:
            return self._nothing(finished)
        by_token = bool(tokens) and tokens[-1] in self._stop_ids
        before = self._detokenizer.num_tokens
        hidden = by_token and not self._wishes.include_stop
        text = self._detokenizer.feed(tokens[:-1] if hidden else tokens)
        stop_reason: int | str | None = self._detokenizer.stopped
        if stop_reason is not None:
            tokens = tokens[: self._detokenizer.num_tokens - before]
            finished = reader.stop(self.index) or end
        elif by_token and tokens[-1] in self._wishes.told_stop_ids:
            stop_reason = tokens[-1]
        self.num_tokens += len(tokens)
        delta = Delta(text, tokens, output.logprobs[: len(tokens)], stop_reason=stop_reason)
        if finished is None:
            return delta
        self.ledger = finished.ledger
        if self._detokenizer.stopped is not None:
            delta.finish_reason = Outcome.STOP.value
            return delta
        if (error := outcome_error(finished)) is not None:
            raise error
        delta.finish_reason = finished.outcome.value
        delta.text += self._detokenizer.flush()
        return delta

    def _nothing(self, finished: Finished | None) -> Delta:
        """Of a stream whose one token nobody asked for."""
        if finished is None:
            return Delta()
        if (error := outcome_error(finished)) is not None:
            raise error
        self.ledger = finished.ledger
        return Delta(finish_reason=Outcome.LENGTH.value)
