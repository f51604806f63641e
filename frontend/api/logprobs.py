"""Log-probabilities as answers write them down."""

from collections.abc import Iterable

from baton.frontend.api.responses import (
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobsField,
    TokenLogprob,
    TopLogprob,
)
from baton.frontend.tokenizer import Tokenizer
from baton.proto.logprobs import PromptLogprobs
from baton.proto.messages import TokenLogprobs

LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON has no number for."""

Scored = tuple[int, TokenLogprobs | None]
"""A token and what is known of it; None for the first of a prompt, which follows nothing."""


class LogprobWriter:
    """Of one answer."""

    def __init__(self, tokenizer: Tokenizer, as_ids: bool) -> None:
        """`as_ids`: tokens are written token_id:N."""
        self._tokenizer = tokenizer
        self._as_ids = as_ids

    def completion(self, scored: Iterable[Scored], offset: int) -> CompletionLogprobs:
        """The four columns of /v1/completions; `offset` is where the first token's text begins."""
        result = CompletionLogprobs([], [], [], [])
        for id, entry in scored:
            token = self.token(id)
            result.text_offset.append(offset)
            result.tokens.append(token)
            result.token_logprobs.append(None if entry is None else _finite(entry.logprob))
            result.top_logprobs.append(None if entry is None else self._top(id, entry))
            offset += len(token)
        return result

    def _top(self, id: int, entry: TokenLogprobs) -> dict[str, float]:
        """Parts of characters all read U+FFFD: the likeliest keeps its text, the others are written as ids."""
        top: dict[str, float] = {}
        for other, logprob in sorted({id: entry.logprob, **dict(entry.top)}.items(), key=lambda item: -item[1]):
            token = self.token(other)
            top[f"token_id:{other}" if token in top else token] = _finite(logprob)
        return top

    def chat(self, scored: Iterable[tuple[int, TokenLogprobs]]) -> ChatLogprobs:
        """One object per token for /v1/chat/completions."""
        return ChatLogprobs(
            [
                TokenLogprob(
                    self.token(id),
                    _finite(entry.logprob),
                    self._bytes(id),
                    [TopLogprob(self.token(other), _finite(value), self._bytes(other)) for other, value in entry.top],
                )
                for id, entry in scored
            ]
        )

    def prompt(self, ids: list[int], found: PromptLogprobs | None, top: int) -> PromptLogprobsField:
        """vLLM's prompt_logprobs, with so many alternatives; None when nobody asked for them."""
        if found is None:
            return None
        entries = zip(ids[1:], found.entries(top), strict=True)
        return [None, *(self._position(id, entry) for id, entry in entries)]

    def _position(self, id: int, entry: TokenLogprobs) -> dict[str, PromptLogprob]:
        of = self._tokenizer.token
        best = {str(other): PromptLogprob(_finite(v), r, of(other)) for r, (other, v) in enumerate(entry.top, 1)}
        return {str(id): PromptLogprob(_finite(entry.logprob), entry.rank, of(id))} | best

    def token(self, id: int) -> str:
        """As the answer names it."""
        return f"token_id:{id}" if self._as_ids else self._tokenizer.token(id)

    def _bytes(self, id: int) -> list[int]:
        """A token may be a part of a character: its bytes say which."""
        if self._tokenizer.byte_level:
            return list(self._tokenizer.token_bytes(id))
        return list(self._tokenizer.token(id).encode())


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
