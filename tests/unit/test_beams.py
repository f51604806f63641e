"""Beam search against a search of all sequences, and its rules one by one."""

import itertools
import random

import pytest

from baton.frontend.beams import BeamSearch
from baton.proto.messages import TokenLogprobs

END = 0


def found(*top: tuple[int, float]) -> TokenLogprobs:
    return TokenLogprobs(top[0][1], 1, tuple(sorted(top, key=lambda entry: -entry[1])))


def search(width: int, max_tokens: int = 10, length_penalty: float = 1.0) -> BeamSearch:
    return BeamSearch(width, max_tokens, frozenset({END}), length_penalty)


@pytest.mark.parametrize("seed", range(20))
def test_wide_enough_it_finds_the_likeliest_sequences_of_all(seed: int) -> None:
    rng = random.Random(seed)
    vocab, length = range(1, 4), 4
    logprobs = {
        prefix: {token: -rng.expovariate(1.0) for token in vocab}
        for size in range(length)
        for prefix in itertools.product(vocab, repeat=size)
    }

    def total(sequence: tuple[int, ...]) -> float:
        return sum(logprobs[sequence[:i]][token] for i, token in enumerate(sequence))

    beams = search(width=3**length, max_tokens=length)
    while not beams.done:
        beams.advance([found(*logprobs[beam.tokens].items()) for beam in beams.running])
    expected = sorted(itertools.product(vocab, repeat=length), key=total, reverse=True)
    assert [ended.beam.tokens for ended in beams.best()] == expected
    assert beams.best()[0].score == pytest.approx(total(expected[0]) / length)


def test_an_end_counts_only_among_the_best_width() -> None:
    beams = search(width=1)
    beams.advance([found((5, -0.1), (END, -0.2))])
    assert [beam.tokens for beam in beams.running] == [(5,)]
    assert beams.best() == []
    beams.advance([found((END, -0.1), (6, -5.0))])
    assert [(ended.beam.tokens, ended.by_token) for ended in beams.best()] == [((5, END), True)]


def test_it_stops_when_no_running_beam_can_win() -> None:
    beams = search(width=1)
    beams.advance([found((END, -0.1), (6, -0.2))])
    assert beams.done, "-0.2 / 1 is worse than -0.1 / 1"
    beams = search(width=1)
    beams.advance([found((5, -0.3), (6, -0.4))])
    beams.advance([found((END, -0.5), (6, -0.5001))])
    assert beams.done


def test_a_high_length_penalty_prefers_the_longer() -> None:
    def run(length_penalty: float) -> tuple[int, ...]:
        beams = search(width=2, max_tokens=3, length_penalty=length_penalty)
        beams.advance([found((5, -0.5), (END, -0.6), (6, -3.0), (7, -4.0))])
        while not beams.done:
            beams.advance([found((8, -0.5), (9, -6.0), (10, -7.0), (11, -8.0)) for _ in beams.running])
        return beams.best()[0].beam.tokens

    assert run(0.0) == (END,)
    assert run(2.0) == (5, 8, 8)


def test_the_length_ends_what_still_runs() -> None:
    beams = search(width=2, max_tokens=1)
    beams.advance([found((5, -0.5), (6, -0.6), (7, -0.7), (8, -0.8))])
    assert beams.done
    assert [(ended.beam.tokens, ended.by_token) for ended in beams.best()] == [((5,), False), ((6,), False)]
