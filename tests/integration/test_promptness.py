"""A token is with the client as soon as it is sampled."""

import json
import statistics
import time

import pytest
from support.deployment import Deployment

pytestmark = pytest.mark.slow

BOUND_S = 0.010
"""From the sampling of the first token to its arrival at the client, one stream running."""


def first_token_delay(deployment: Deployment, prompt: list[int]) -> float:
    """Seconds; both ends read the same CLOCK_MONOTONIC."""
    body = {"prompt": prompt, "max_tokens": 4, "ignore_eos": True, "stream": True}
    arrived, sampled = 0.0, 0.0
    with deployment.client.stream("POST", "/v1/completions", json=body, headers={"x-baton-ledger": "1"}) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            arrived = arrived or time.monotonic()
            ledger = json.loads(line.removeprefix("data: ")).get("baton_ledger")
            if ledger:
                sampled = ledger["stages"]["sampled"]
    assert sampled, "no ledger in the stream"
    return arrived - sampled


@pytest.mark.parametrize("flags", [("--unified", "1"), ("--prefill", "1", "--decode", "1")])
def test_the_first_token_arrives_within_ten_milliseconds_of_being_sampled(flags: tuple[str, ...]) -> None:
    with Deployment(*flags, "--max-model-len", "1024") as deployment:
        delays = [first_token_delay(deployment, list(range(1000 + i, 1040 + i))) for i in range(15)]
    print(f"{flags}: median {1000 * statistics.median(delays):.2f} ms, worst {1000 * max(delays):.2f} ms")
    assert statistics.median(delays) < BOUND_S
