"""Token ids to text as they come: never half a character, never text that may still become a stop string."""

import codecs
from collections.abc import Sequence
from typing import Protocol

from baton.frontend.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"
PROMPT_END_TOKENS = 8
"""So many tell how the text goes on behind a prompt."""
_MAX_PENDING_TOKENS = 32
"""A window that has been incomplete for so many tokens is no character in the making."""
_MAX_CHAR_TOKENS = 4
"""One for each byte."""


class Decoder(Protocol):
    """Token ids in, text out; what both give over time is the decoding of the whole."""

    def feed(self, token: int) -> str:
        """The text that this token completes."""

    def flush(self) -> str:
        """What is left at the end: incomplete bytes become U+FFFD."""


class ByteLevelDecoder:
    """For tokenizers whose tokens are fixed bytes: constant work per token. They put no spaces between tokens."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._spelling = tokenizer.spelling
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._inside = False
        """The bytes so far end inside a character."""

    def feed(self, token: int) -> str:
        if token in self._skip:
            return ""
        spelling = self._spelling[token]
        if isinstance(spelling, str):
            if not self._inside:
                return spelling
            spelling = spelling.encode()
        text = self._decoder.decode(spelling)
        self._inside = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        return self._decoder.decode(b"", True)


class WindowDecoder:
    """For all others, whose tokens may look different in company: decodes a window of the latest tokens twice, with and
    without the new ones, and emits the difference once it does not end inside a character.

    The first window is the end of the prompt: at the beginning of a text, many decoders leave out a space.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        skip_special_tokens: bool,
        spaces_between_special_tokens: bool,
        prompt_end: Sequence[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._spaces = spaces_between_special_tokens
        self._last = prompt_end[-1] if prompt_end else -1
        self._window = self._whole_characters(prompt_end)
        self._emitted = len(self._window)
        """Tokens of the window whose text is out."""

    def feed(self, token: int) -> str:
        special = token in self._tokenizer.special_ids
        if self._skip and special:
            return ""
        close = special and not self._spaces and self._last in self._tokenizer.special_ids
        self._last = token
        if close:
            text = self.flush() + (self._tokenizer.piece(token) or "")
            self._window, self._emitted = [], 0
            return text
        self._window.append(token)
        new = self._new_text()
        pending = len(self._window) - self._emitted
        if not new or (new.endswith(REPLACEMENT) and pending <= _MAX_PENDING_TOKENS):
            return ""
        del self._window[: self._emitted]
        self._emitted = len(self._window)
        return new

    def flush(self) -> str:
        new = self._new_text()
        self._emitted = len(self._window)
        return new

    def _whole_characters(self, prompt_end: Sequence[int]) -> list[int]:
        """Without what is not shown, and without the rest of a character that is cut off at the beginning; nothing when
        the prompt itself ends inside a character."""
        skipped = self._tokenizer.special_ids if self._skip else frozenset()
        ids = [id for id in prompt_end if id not in skipped]
        suffixes = (ids[start:] for start in range(_MAX_CHAR_TOKENS))
        return next((suffix for suffix in suffixes if not self._decode(suffix).endswith(REPLACEMENT)), [])

    def _new_text(self) -> str:
        before, text = self._decode(self._window[: self._emitted]), self._decode(self._window)
        if REPLACEMENT in text and not text.startswith(before):
            return self._decode(self._window[self._emitted :])  # bytes that are no character spoil those before them
        return text[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class Detokenizer:
    """One output stream's text."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_end: Sequence[int] = (),
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """`prompt_end`: the last PROMPT_END_TOKENS that the output continues.

        A stop string ends the text before itself, or after it with include_stop; it must end behind the first
        `min_tokens` tokens.
        """
        self._decoder: Decoder
        if tokenizer.byte_level:
            self._decoder = ByteLevelDecoder(tokenizer, skip_special_tokens)
        else:
            self._decoder = WindowDecoder(tokenizer, skip_special_tokens, spaces_between_special_tokens, prompt_end)
        self._stop = StopStrings(stop, include_stop) if stop else None
        self._min_tokens = min_tokens
        self.num_tokens = 0
        """Tokens taken so far; after a stop, up to and with the one that completed the stop string."""

    @property
    def stopped(self) -> str | None:
        """The stop string that ended the text."""
        return self._stop.found if self._stop else None

    def feed(self, tokens: Sequence[int]) -> str:
        """The text that is certain after these tokens; those behind a stop string are not looked at."""
        if self._stop is None:
            self.num_tokens += len(tokens)
            return "".join(map(self._decoder.feed, tokens))
        parts = []
        for token in tokens:
            if self._stop.found is not None:
                break
            self.num_tokens += 1
            text = self._decoder.feed(token)
            parts.append(self._stop.feed(text, search=self.num_tokens > self._min_tokens))
        return "".join(parts)

    def flush(self) -> str:
        """The rest, when no more tokens come."""
        if self.stopped is not None:
            return ""
        text = self._decoder.flush()
        if self._stop is None:
            return text
        text = self._stop.feed(text)
        return text + self._stop.flush()


class StopStrings:
    """Looks for the stop string that is complete first in a text that comes in pieces."""

    def __init__(self, stop: Sequence[str], include: bool) -> None:
        self._beginnings = [_Beginning(text) for text in stop]
        self._include = include
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str, search: bool = True) -> str:
        """What can't be part of a stop string any more; up to the stop string when one is complete.

        Without `search` none is complete, but one may have begun that a later text completes.
        """
        old, held = len(self._held), self._held + text
        ends = [(each.feed(text, search), each.stop) for each in self._beginnings]
        complete = [(old + end, stop) for end, stop in ends if end is not None]
        if complete:
            end, self.found = min(complete, key=lambda match: match[0])
            self._held = ""
            return held[:end] if self._include else held[: end - len(self.found)]
        sure = len(held) - max(each.length for each in self._beginnings)
        self._held = held[sure:]
        return held[:sure]

    def flush(self) -> str:
        """The held text, when nothing follows that could complete a stop string."""
        text, self._held = self._held, ""
        return text


class _Beginning:
    """How much of one stop string the text ends with, by the algorithm of Knuth, Morris and Pratt: the mean work per
    character does not grow with the stop string."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._borders = [0, 0]
        """Of each beginning that the text has had, by length: how long its longest end is that is a beginning, too."""

    def feed(self, text: str, search: bool) -> int | None:
        """Where in this text the stop string is complete for the first time, after which no more is fed; None: nowhere.
        Without `search` one that is complete may only be the beginning of another."""
        if not self.length and self.stop[0] not in text:
            return None
        for end, char in enumerate(text, 1):
            self.length = self._extended(self.length, char)
            if self.length == len(self._borders):
                self._borders.append(self._extended(self._borders[-1], char))
            if self.length == len(self.stop):
                if search:
                    return end
                self.length = self._borders[self.length]
        return None

    def _extended(self, length: int, char: str) -> int:
        """How much of the stop string a text ends with that ended with so much of it before this character."""
        while length and self.stop[length] != char:
            length = self._borders[length]
        return length + (self.stop[length] == char)
