"""Compiled grammars of a worker: made in a thread, kept for the streams to come.

The first grammar also loads the tokenizer's vocabulary, so that a worker that never sees one pays nothing.
"""

import os
import threading
from collections import Counter, OrderedDict, deque
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from baton.proto.config import ModelConfig
from baton.proto.grammar import GrammarError, grammar_tokenizer, new_matcher
from baton.worker.effects import Compiled

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_KEPT = 256
"""Compiled grammars beside those that a request needs; the one that was not asked for longest goes first."""


class GrammarCompiler:
    """Grammar to matcher. `matcher` is for whoever can wait, from any thread; the rest is for a loop.

    Owns a thread and a descriptor; close() ends them.
    """

    def __init__(self, model: ModelConfig, vocab_size: int) -> None:
        self._model, self._vocab_size = model, vocab_size
        self._tokenizer: LLTokenizer | None = None
        self._kept: OrderedDict[str, Future[LLMatcher]] = OrderedDict()
        self._holders: Counter[str] = Counter()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammar")
        self._completed: deque[Compiled] = deque()
        self._done = os.eventfd(0, os.EFD_NONBLOCK)

    def request(self, grammar: str) -> None:
        """Compile it, or find it, and keep it until it is released; `completed` tells when it is there."""
        self.hold(grammar)
        self.matcher(grammar).add_done_callback(lambda future: self._complete(grammar, future))

    def hold(self, grammar: str) -> None:
        """Keep it, once it is compiled, for one request more."""
        with self._lock:
            self._holders[grammar] += 1

    def release(self, grammar: str) -> None:
        """For one request less."""
        with self._lock:
            self._holders[grammar] -= 1
            if not self._holders[grammar]:
                del self._holders[grammar]
                self._evict()

    def release_all(self) -> None:
        """No request is left."""
        with self._lock:
            self._holders.clear()
            self._evict()

    def fileno(self) -> int:
        """Readable while `completed` has something to return."""
        return self._done

    def completed(self) -> list[Compiled]:
        """What became of requests since the last call."""
        try:
            os.eventfd_read(self._done)
        except BlockingIOError:
            return []
        return [self._completed.popleft() for _ in range(len(self._completed))]

    def matcher(self, grammar: str) -> "Future[LLMatcher]":
        """The grammar's matcher at its start: copy it, never advance it. Holds GrammarError when there is none."""
        with self._lock:
            future = self._kept.get(grammar)
            if future is None:
                future = self._kept[grammar] = self._thread.submit(self._compile, grammar)
            self._kept.move_to_end(grammar)
            self._evict()
        return future

    def _evict(self) -> None:
        beyond = len(self._kept) - len(self._holders) - MAX_KEPT
        unused = (grammar for grammar in self._kept if grammar not in self._holders)
        for grammar in list(islice(unused, max(0, beyond))):
            del self._kept[grammar]

    @property
    def vocabulary(self) -> "LLTokenizer":
        """What masks are over; only once a matcher was made."""
        assert self._tokenizer is not None
        return self._tokenizer

    def close(self) -> None:
        """End after what is being compiled."""
        self._thread.shutdown(cancel_futures=True)
        os.close(self._done)

    def _compile(self, grammar: str) -> "LLMatcher":
        if self._tokenizer is None:
            self._tokenizer = grammar_tokenizer(_read_tokenizer(self._model), self._vocab_size)
        matcher = new_matcher(self._tokenizer, grammar)
        matcher.compute_bitmask()  # copies start with the lexer states of the first mask
        return matcher

    def _complete(self, grammar: str, future: "Future[LLMatcher]") -> None:
        if future.cancelled():
            return
        self._completed.append(Compiled(grammar, str(future.exception() or "")))
        os.eventfd_write(self._done, 1)


def _read_tokenizer(model: ModelConfig) -> tokenizers.Tokenizer:
    path = Path(model.tokenizer or model.path)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise GrammarError(f"the worker can't read {file.name}: {error}") from error
