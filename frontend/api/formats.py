"""The two shapes of an answer: completion and chat, each whole or in chunks."""

import time
import uuid
from collections.abc import Iterable
from typing import Protocol

from msgspec import UNSET, UnsetType

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.params import Wishes
from baton.frontend.api.responses import (
    CalledFunction,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    TokenLogprob,
    ToolCall,
    TopLogprob,
    Usage,
)
from baton.frontend.tokenizer import Tokenizer
from baton.frontend.tools.output import CallPart
from baton.proto.messages import Ledger, TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for."""

UsageField = Usage | UnsetType | None
LedgerField = Ledger | list[Ledger] | UnsetType


class Format(Protocol):
    """How an answer is written down."""

    def whole(self, choices: list[tuple[Choice, Delta]], usage: Usage, ledger: LedgerField) -> object:
        """The answer in one piece."""

    def chunks(self, choice: Choice, delta: Delta, first: bool, usage: UsageField) -> list[object]:
        """What a delta becomes; `first` is the first of its choice."""

    def last(self, usage: UsageField, ledger: LedgerField) -> object:
        """A chunk without choices."""


class CompletionFormat:
    """/v1/completions"""

    def __init__(self, model: str, wishes: Wishes, tokenizer: Tokenizer) -> None:
        self._id, self._created, self._model = f"cmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._wishes = wishes
        self._tokenizer = tokenizer
        self._offsets: dict[int, int] = {}

    def whole(self, choices: list[tuple[Choice, Delta]], usage: Usage, ledger: LedgerField) -> Completion:
        return self._envelope([self._choice(choice, delta, True) for choice, delta in choices], usage, ledger)

    def chunks(self, choice: Choice, delta: Delta, first: bool, usage: UsageField) -> list[object]:
        return [self._envelope([self._choice(choice, delta, first)], usage)]

    def last(self, usage: UsageField, ledger: LedgerField) -> Completion:
        return self._envelope([], usage, ledger)

    def _envelope(self, choices: list[CompletionChoice], usage: UsageField, ledger: LedgerField = UNSET) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, baton_ledger=ledger
        )

    def _choice(self, choice: Choice, delta: Delta, first: bool) -> CompletionChoice:
        with_ids = self._wishes.return_token_ids
        return CompletionChoice(
            choice.index,
            delta.text,
            self._logprobs(choice.index, delta) if self._wishes.logprobs is not None else None,
            delta.finish_reason,
            delta.stop_reason,
            delta.token_ids if with_ids else UNSET,
            choice.prompt.ids.tolist() if with_ids and first else UNSET,
        )

    def _logprobs(self, index: int, delta: Delta) -> CompletionLogprobs:
        offset = self._offsets.get(index, 0)
        result = CompletionLogprobs([], [], [], [])
        for id, entry in zip(delta.token_ids, delta.logprobs, strict=True):
            token = self._tokenizer.token(id)
            result.text_offset.append(offset)
            result.tokens.append(token)
            result.token_logprobs.append(_finite(entry.logprob))
            result.top_logprobs.append(self._top(token, entry))
            offset += len(token)
        self._offsets[index] = offset
        return result

    def _top(self, token: str, entry: TokenLogprobs) -> dict[str, float] | None:
        if not self._wishes.logprobs:
            return None
        top = {self._tokenizer.token(id): _finite(logprob) for id, logprob in entry.top}
        return {token: _finite(entry.logprob)} | top


class ChatFormat:
    """/v1/chat/completions"""

    def __init__(self, model: str, wishes: Wishes, tokenizer: Tokenizer) -> None:
        self._id, self._created, self._model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model
        self._wishes = wishes
        self._tokenizer = tokenizer

    def whole(self, choices: list[tuple[Choice, Delta]], usage: Usage, ledger: LedgerField) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=_message(delta),
                    logprobs=self._logprobs(delta),
                    finish_reason=delta.finish_reason,
                    stop_reason=delta.stop_reason,
                    token_ids=delta.token_ids if self._wishes.return_token_ids else UNSET,
                    prompt_token_ids=self._prompt_ids(choice),
                )
                for choice, delta in choices
            ],
            usage=usage,
            baton_ledger=ledger,
            prompt_token_ids=self._prompt_ids(choices[0][0]),
        )

    def chunks(self, choice: Choice, delta: Delta, first: bool, usage: UsageField) -> list[object]:
        piece = ChatChunkChoice(
            index=choice.index,
            delta=_piece(delta),
            logprobs=self._logprobs(delta),
            finish_reason=delta.finish_reason,
            stop_reason=delta.stop_reason,
            token_ids=delta.token_ids if self._wishes.return_token_ids else UNSET,
        )
        chunk = self._chunk([piece], usage)
        if not first:
            return [chunk]
        prompt_ids = self._prompt_ids(choice)
        role = ChatChunkChoice(
            index=choice.index, delta=ChatDelta(role="assistant", content=""), prompt_token_ids=prompt_ids
        )
        opening = self._chunk([role], usage)
        opening.prompt_token_ids = prompt_ids
        return [opening, chunk]

    def last(self, usage: UsageField, ledger: LedgerField) -> ChatChunk:
        return self._chunk([], usage, ledger)

    def _chunk(self, choices: list[ChatChunkChoice], usage: UsageField, ledger: LedgerField = UNSET) -> ChatChunk:
        return ChatChunk(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, baton_ledger=ledger
        )

    def _prompt_ids(self, choice: Choice) -> list[int] | UnsetType:
        return choice.prompt.ids.tolist() if self._wishes.return_token_ids else UNSET

    def _logprobs(self, delta: Delta) -> ChatLogprobs | None:
        if self._wishes.logprobs is None:
            return None
        return ChatLogprobs(self.spell(zip(delta.token_ids, delta.logprobs, strict=True)))

    def spell(self, sampled: Iterable[tuple[int, TokenLogprobs]]) -> list[TokenLogprob]:
        """Tokens with their log probabilities."""
        return [
            TokenLogprob(
                self._tokenizer.token(id),
                _finite(entry.logprob),
                self._bytes(id),
                [self._alternative(*top) for top in entry.top],
            )
            for id, entry in sampled
        ]

    def _alternative(self, id: int, logprob: float) -> TopLogprob:
        return TopLogprob(self._tokenizer.token(id), _finite(logprob), self._bytes(id))

    def _bytes(self, id: int) -> list[int]:
        """A token may be a part of a character: its bytes say which."""
        if self._tokenizer.byte_level:
            return list(self._tokenizer.token_bytes(id))
        return list(self._tokenizer.token(id).encode())


def _message(delta: Delta) -> ChatMessage:
    reasoning = delta.reasoning or UNSET
    return ChatMessage(
        content=delta.text or (None if delta.reasoning or delta.calls else ""),
        reasoning=reasoning,
        reasoning_content=reasoning,
        tool_calls=_whole_calls(delta.calls) or UNSET,
    )


def _whole_calls(parts: list[CallPart]) -> list[ToolCall]:
    calls: dict[int, ToolCall] = {}
    for part in parts:
        if part.index not in calls:
            calls[part.index] = ToolCall(id=part.id, type="function", function=CalledFunction(part.name))
        calls[part.index].function.arguments += part.arguments
    return list(calls.values())


def _piece(delta: Delta) -> ChatDelta:
    if not (delta.reasoning or delta.calls):
        return ChatDelta(content=delta.text)
    reasoning = delta.reasoning or UNSET
    return ChatDelta(
        content=delta.text or UNSET,
        reasoning=reasoning,
        reasoning_content=reasoning,
        tool_calls=[_call_piece(part) for part in delta.calls] or UNSET,
    )


def _call_piece(part: CallPart) -> ToolCall:
    if not part.name:
        return ToolCall(index=part.index, function=CalledFunction(arguments=part.arguments))
    function = CalledFunction(part.name, part.arguments)
    return ToolCall(index=part.index, id=part.id, type="function", function=function)


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
