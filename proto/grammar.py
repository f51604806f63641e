"""What a grammar in SamplingParams means: the same compiler, limits and tokenizer in frontend and worker.

A grammar is llguidance's own JSON form. The frontend makes and tries it, a worker compiles it again; both through this
module, so that what was accepted here can't be refused there. Nothing is loaded before the first grammar is needed.
"""

from typing import TYPE_CHECKING

import tokenizers

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_GRAMMAR_BYTES = 256 * 1024
"""Of the canonical form: it travels with every leg of a request."""
_LEXER_FUEL_PER_STEP = 20_000
"""Bounds one step's mask to tens of milliseconds; what ordinary schemas need is a thousandth of it."""
_MAX_LEXER_STATES = 50_000
"""About 100 MB for the worst stream."""


class GrammarError(ValueError):
    """A grammar that can't be compiled; the text says what is wrong with it."""


def grammar_tokenizer(backend: tokenizers.Tokenizer, vocab_size: int) -> "LLTokenizer":
    """The vocabulary as the grammar compiler sees it: bytes of each token, special tokens apart.

    `vocab_size` is the model's; ids without text are never allowed. Raises GrammarError for a tokenizer whose tokens
    are not bytes. Takes about a second for a vocabulary of 100,000.
    """
    from llguidance import LLTokenizer

    added = backend.get_added_tokens_decoder()
    # Which tokens end a stream is the request's to say (SamplingParams.stop_token_ids). The library needs one that is
    # not text, and never sees it.
    end = next((id for id, token in sorted(added.items()) if token.special), None)
    size = max(vocab_size, 1 + max(backend.get_vocab(with_added_tokens=True).values()))
    try:
        return LLTokenizer(backend.to_str(), n_vocab=size, eos_token=end)
    except ValueError as error:
        raise GrammarError(f"output of this model's tokenizer can't be constrained: {error}") from error


def new_matcher(tokenizer: "LLTokenizer", grammar: str) -> "LLMatcher":
    """A matcher at its start. Releases the interpreter lock while it compiles. Raises GrammarError."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        step_lexer_fuel=_LEXER_FUEL_PER_STEP, max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if matcher.is_error():
        raise GrammarError(matcher.get_error())
    return matcher
