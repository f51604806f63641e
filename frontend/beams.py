"""Beam search over an engine that continues one sequence by one token: which beams go on, and which are the answer.

    BeamSearch.running ─► the engine: the best next tokens of each ─► advance(found) ─► … until done ─► best()

The search is that of transformers (`generate(num_beams=…)` with early_stopping=False), so that results are the same:
candidates are all beams' continuations by summed log-probability; one that ends counts only among the best `width`; a
finished sequence scores sum / length ** length_penalty, its end token included and its prompt not; the search is over
when the best running beam, at its present length, can't beat the worst of `width` finished ones.
"""

import heapq
from dataclasses import dataclass, field
from operator import itemgetter

from baton.proto.messages import TokenLogprobs


def num_alternatives(width: int, num_end_ids: int) -> int:
    """Best next tokens that a search needs of each beam: if all end tokens are among them, enough others are."""
    return max(2, 1 + num_end_ids) * width


@dataclass(frozen=True)
class Beam:
    """One output so far."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    """Of each token, with the alternatives that there were."""
    total: float = 0.0
    """Sum of the tokens' log-probabilities."""

    def then(self, token: int, logprob: float, rank: int, found: TokenLogprobs) -> "Beam":
        """One token longer."""
        entry = TokenLogprobs(logprob, rank, found.top)
        return Beam((*self.tokens, token), (*self.logprobs, entry), self.total + logprob)


@dataclass(frozen=True)
class Ended:
    """A finished output."""

    beam: Beam
    score: float
    by_token: bool
    """Its last token is an end token; else its length ended it."""


@dataclass
class BeamSearch:
    """The search of one prompt."""

    width: int
    max_tokens: int
    end_ids: frozenset[int]
    length_penalty: float
    running: list[Beam] = field(default_factory=lambda: [Beam()])
    """What the engine is to continue next, best first."""
    done: bool = False
    _ended: list[Ended] = field(default_factory=list)

    @property
    def num_alternatives(self) -> int:
        """Best next tokens that `advance` needs of each beam."""
        return num_alternatives(self.width, len(self.end_ids))

    def advance(self, found: list[TokenLogprobs]) -> None:
        """Go on by one token; `found[i].top` are the best continuations of running[i], best first."""
        # Most continuations go no further: a copy of all that came before would be made for nothing.
        best = heapq.nlargest(
            self.num_alternatives,
            (
                (beam.total + logprob, beam, token, logprob, rank, step)
                for beam, step in zip(self.running, found, strict=True)
                for rank, (token, logprob) in enumerate(step.top, 1)
            ),
            key=itemgetter(0),
        )
        candidates = [beam.then(token, logprob, rank, step) for _, beam, token, logprob, rank, step in best]
        length = len(candidates[0].tokens)
        full = length >= self.max_tokens
        ended = [beam for beam in candidates[: self.width] if full or beam.tokens[-1] in self.end_ids]
        self._ended += [Ended(beam, self._score(beam.total, length), beam.tokens[-1] in self.end_ids) for beam in ended]
        self._ended.sort(key=lambda each: -each.score)
        del self._ended[self.width :]
        self.running = [] if full else [beam for beam in candidates if beam.tokens[-1] not in self.end_ids]
        del self.running[self.width :]
        self.done = not self.running or self._beaten(length)

    def best(self) -> list[Ended]:
        """The `width` best outputs, best first."""
        return self._ended

    def _score(self, total: float, length: int) -> float:
        return total / length**self.length_penalty

    def _beaten(self, length: int) -> bool:
        if len(self._ended) < self.width:
            return False
        return self._score(self.running[0].total, length) <= self._ended[-1].score
