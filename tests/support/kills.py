"""kill -9 of a deployment's own workers, again and again, while streams run."""

import concurrent.futures
import os
import random
import signal
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from support.deployment import Deployment

FIELDS = {"max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1, "return_token_ids": True}
ROUNDING = 1e-4


def told(answers: list[dict[str, Any]]) -> list[tuple[list[int], list[float]]]:
    """Tokens, and their logprobs, which a wrong block would change far beyond rounding."""
    choices = [answer["choices"][0] for answer in answers]
    return [(choice["token_ids"], choice["logprobs"]["token_logprobs"]) for choice in choices]


def kill_in_place(deployment: Deployment, workers: list[str], prompts: list[list[int]], kills: int) -> None:
    """Kill the workers in turn at random moments of these prompts: no request is lost, no token changes."""
    undisturbed = told(deployment.complete_all(prompts, **FIELDS))
    deaths: Counter[str] = Counter()
    worst = 0.0
    with ThreadPoolExecutor(1) as pool:
        for kill in range(kills):
            victim = workers[kill % len(workers)]
            if deaths[victim]:
                deployment.wait_for(f"{victim} is ready again", deaths[victim])
            deaths[victim] += 1
            beside = pool.submit(deployment.complete_all, prompts, **FIELDS)
            concurrent.futures.wait([beside], timeout=random.uniform(0, 1.5))
            os.kill(deployment.pids()[victim], signal.SIGKILL)
            for (tokens, logprobs), expected in zip(told(beside.result()), undisturbed, strict=True):
                assert tokens == expected[0], f"after kill {kill}, of {victim}"
                worst = max(worst, *(abs(a - b) for a, b in zip(logprobs, expected[1], strict=True)))
    for victim, count in deaths.items():
        deployment.wait_for(f"{victim} is ready again", count)
    deployment.wait_idle()
    print(f"{kills} kills, {deployment.total('baton_retries_total'):.0f} attempts repeated; logprobs {worst:.1e} apart")
    assert worst < ROUNDING
