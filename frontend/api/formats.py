"""The two shapes of an answer: completion and chat, each whole or in chunks."""

import time
import uuid
from collections.abc import Iterable
from typing import Protocol

from msgspec import UNSET, UnsetType

from baton.frontend.api.choice import Choice, Delta
from baton.frontend.api.logprobs import LogprobWriter, Scored
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
    PromptLogprobsField,
    TokenLogprob,
    ToolCall,
    Usage,
)
from baton.frontend.tokenizer import Tokenizer
from baton.frontend.tools.output import CallPart
from baton.proto.messages import Ledger, TokenLogprobs

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
        self._id, self._created, self._model = f"cmpl-{_request_id(wishes)}", int(time.time()), model
        self._wishes = wishes
        self._tokenizer = tokenizer
        self._logprob_writer = LogprobWriter(tokenizer, wishes.tokens_as_ids)
        self._offsets: dict[int, int] = {}

    def whole(self, choices: list[tuple[Choice, Delta]], usage: Usage, ledger: LedgerField) -> Completion:
        answer = self._envelope([self._choice(choice, delta, True) for choice, delta in choices], usage, ledger)
        answer.kv_transfer_params = None
        for written, (choice, _) in zip(answer.choices, choices, strict=True):
            written.prompt_logprobs = _prompt_logprobs(self._logprob_writer, choice, self._wishes)
        return answer

    def chunks(self, choice: Choice, delta: Delta, first: bool, usage: UsageField) -> list[object]:
        return [self._envelope([self._choice(choice, delta, first)], usage)]

    def last(self, usage: UsageField, ledger: LedgerField) -> Completion:
        return self._envelope([], usage, ledger)

    def _envelope(self, choices: list[CompletionChoice], usage: UsageField, ledger: LedgerField = UNSET) -> Completion:
        return Completion(
            id=self._id, created=self._created, model=self._model, choices=choices, usage=usage, baton_ledger=ledger
        )

    def _choice(self, choice: Choice, delta: Delta, first: bool) -> CompletionChoice:
        with_ids, echo = self._wishes.return_token_ids, self._wishes.echo and first
        return CompletionChoice(
            choice.index,
            self._prompt_text(choice) + delta.text if echo else delta.text,
            self._logprobs(choice, delta, echo) if self._wishes.logprobs is not None else None,
            delta.finish_reason,
            delta.stop_reason,
            token_ids=delta.token_ids if with_ids else UNSET,
            prompt_token_ids=choice.prompt.ids.tolist() if with_ids and first else UNSET,
        )

    def _prompt_text(self, choice: Choice) -> str:
        prompt = choice.prompt
        return self._tokenizer.decode(prompt.ids.tolist(), False) if prompt.text is None else prompt.text

    def _logprobs(self, choice: Choice, delta: Delta, echo: bool) -> CompletionLogprobs:
        scored: list[Scored] = list(zip(delta.token_ids, delta.logprobs, strict=True))
        if echo and choice.prompt_logprobs is not None:
            told: list[TokenLogprobs | None] = [None, *choice.prompt_logprobs.entries(self._wishes.logprobs)]
            scored = [*zip(choice.prompt.ids.tolist(), told, strict=True), *scored]
        result = self._logprob_writer.completion(scored, self._offsets.get(choice.index, 0))
        if result.tokens:
            self._offsets[choice.index] = result.text_offset[-1] + len(result.tokens[-1])
        return result


class ChatFormat:
    """/v1/chat/completions"""

    def __init__(self, model: str, wishes: Wishes, tokenizer: Tokenizer) -> None:
        self._id, self._created, self._model = f"chatcmpl-{_request_id(wishes)}", int(time.time()), model
        self._wishes = wishes
        self._logprob_writer = LogprobWriter(tokenizer, wishes.tokens_as_ids)

    def whole(self, choices: list[tuple[Choice, Delta]], usage: Usage, ledger: LedgerField) -> ChatCompletion:
        return ChatCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=_message(delta, self._wishes.prefix),
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
            kv_transfer_params=None,
            prompt_logprobs=_prompt_logprobs(self._logprob_writer, choices[0][0], self._wishes),
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
        beginning = ChatDelta(role="assistant", content=self._wishes.prefix)
        role = ChatChunkChoice(index=choice.index, delta=beginning, prompt_token_ids=prompt_ids)
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
        return self._logprob_writer.chat(zip(delta.token_ids, delta.logprobs, strict=True))

    def spell(self, sampled: Iterable[tuple[int, TokenLogprobs]]) -> list[TokenLogprob]:
        """Tokens with their log probabilities."""
        return self._logprob_writer.chat(sampled).content


def _prompt_logprobs(writer: LogprobWriter, choice: Choice, wishes: Wishes) -> PromptLogprobsField:
    if wishes.prompt_logprobs is None:
        return None
    return writer.prompt(choice.prompt.ids.tolist(), choice.prompt_logprobs, wishes.prompt_logprobs)


def _request_id(wishes: Wishes) -> str:
    return wishes.request_id or uuid.uuid4().hex


def _message(delta: Delta, prefix: str) -> ChatMessage:
    reasoning = delta.reasoning or None
    return ChatMessage(
        content=prefix + delta.text or (None if delta.reasoning or delta.calls else ""),
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
    if not part.id:
        return ToolCall(index=part.index, function=CalledFunction(arguments=part.arguments))
    function = CalledFunction(part.name, part.arguments)
    return ToolCall(index=part.index, id=part.id, type="function", function=function)
