"""Random histories of a whole cluster: the real streams, cluster, batcher and leases over a simulated network.

Each seed draws workers, whose pools and contexts may differ, requests (of one sample or several, some with a grammar or
their prompt's log-probabilities, some for a vector instead of tokens), aborts, faults (cut links, crashes, orderly
exits, pauses, slow and repeating links) and an operator, who drains, resumes and removes workers, changes roles,
empties caches and cancels requests. In some histories workers that end never come back, at times the largest, seldom
all. This comes at random times, in some histories also at the very moment at which a message of some kind is sent. The
workers have pools of their own and copy blocks, or share one pool and swap them. Every token is checked against the
prefix it must follow from, and every vector against its prompt, through what the simulated KV blocks hold (see
sim/model.py). When the faults stop, every request has ended exactly once and everything is free again within bounded
time; what failed can be held by nobody who is left. Then a few more are asked, of which the outcome is known.
"""

import pytest
from sim.campaign import Tally, run_campaign, run_seeds

DEPTHS = (1, 2, 4)
SHARED = pytest.mark.parametrize("shared", [False, True], ids=["pools of their own", "one pool"])
FAST_SEEDS = range(100)
ALL_SEEDS = range(2000)


def check(tally: Tally) -> None:
    """No seed failed, and the faults were no dry run."""
    shown = "\n".join(tally.failures[:5])
    assert not tally.failures, f"{len(tally.failures)} of {tally.runs} histories went wrong:\n{shown}"
    assert tally.retries > tally.runs / 4
    assert tally.requests > 5 * tally.runs
    assert tally.vectors > tally.runs / 2


@SHARED
@pytest.mark.parametrize("depth", DEPTHS)
def test_random_histories_lose_and_splice_nothing(depth: int, shared: bool) -> None:
    check(run_seeds(FAST_SEEDS, depth, shared))


@pytest.mark.slow
@SHARED
@pytest.mark.parametrize("depth", DEPTHS)
def test_thousands_of_random_histories_lose_and_splice_nothing(depth: int, shared: bool) -> None:
    check(run_campaign(ALL_SEEDS[len(FAST_SEEDS) :], depth, shared))
