"""A token is with the client as soon as it is sampled."""

import itertools
import json
import statistics
import time

import pytest
from support.deployment import Deployment

pytestmark = pytest.mark.slow

BOUND = 1 / 3
"""Of a stream's time between two tokens, from the sampling of its first to that one's arrival at the client: 10 of 30
ms on two quiet cores, and both grow on busy ones. A token that waits for the next is there after one such time."""


def first_token_delay(deployment: Deployment, prompt: list[int]) -> tuple[float, float]:
    """Of the first token, and between two tokens (median), in seconds; all ends read the same CLOCK_MONOTONIC."""
    body = {"prompt": prompt, "max_tokens": 8, "ignore_eos": True, "stream": True}
    arrivals, sampled = [], 0.0
    with deployment.client.stream("POST", "/v1/completions", json=body, headers={"x-baton-ledger": "1"}) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            arrivals.append(time.monotonic())
            ledger = json.loads(line.removeprefix("data: ")).get("baton_ledger")
            if ledger:
                sampled = ledger["stages"]["sampled"]
    assert sampled, "no ledger in the stream"
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    return arrivals[0] - sampled, statistics.median(gaps)


@pytest.mark.parametrize("flags", [("--unified", "1"), ("--prefill", "1", "--decode", "1")])
def test_the_first_token_does_not_wait_for_the_second(flags: tuple[str, ...]) -> None:
    with Deployment(*flags, "--max-model-len", "1024") as deployment:
        times = [first_token_delay(deployment, list(range(1000 + i, 1040 + i))) for i in range(15)]
    shares = [delay / gap for delay, gap in times]
    delays = [1000 * delay for delay, _gap in times]
    told = f"median {statistics.median(delays):.2f} ms, worst {max(delays):.2f} ms"
    print(f"{flags}: {told}; of the time between two tokens: median {statistics.median(shares):.2f}")
    assert statistics.median(shares) < BOUND
