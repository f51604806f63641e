"""What a benchmark asks, and when: prompts of exact length, recorded conversations, arrival times."""

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from baton.proto.errors import UserError

TOKEN_IDS = (1000, 10000)
"""Random prompts draw from this range: ordinary tokens in every vocabulary of the field, none of them special."""
SHORTEST = 4
LONGEST_PROMPT = 1024
LONGEST_TOTAL = 2048
"""Conversations outside these token counts are left out, as vLLM's benchmark does."""


@dataclass(frozen=True)
class Request:
    """One request of a benchmark."""

    prompt: str | list[int]
    output_len: int
    """max_tokens."""


def random_work(
    count: int, input_len: int, output_len: int, range_ratio: float, seed: int
) -> list[tuple[list[int], int]]:
    """(prompt as token ids, so that its length is exact; output length) of `count` requests.

    Lengths are uniform in [n (1 - range_ratio), n (1 + range_ratio)].
    """
    generator = np.random.default_rng(seed)

    def length(mean: int) -> int:
        low, high = max(1, int(mean * (1 - range_ratio))), int(mean * (1 + range_ratio))
        return int(generator.integers(low, high, endpoint=True))

    return [(generator.integers(*TOKEN_IDS, size=length(input_len)).tolist(), length(output_len)) for _ in range(count)]


def read_sharegpt(path: Path, seed: int) -> list[tuple[str, str]]:
    """(question, recorded answer) of each conversation that begins with two turns, shuffled. Raises UserError."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        turns = [entry.get("conversations") or entry.get("conversation") or [] for entry in entries]
        pairs = [(first["value"], second["value"]) for first, second, *_ in (t for t in turns if len(t) >= 2)]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no ShareGPT-style JSON file: {type(error).__name__}: {error}") from error
    order = np.random.default_rng(seed).permutation(len(pairs))
    return [pairs[index] for index in order]


async def sharegpt_requests(
    conversations: list[tuple[str, str]],
    count: int,
    output_len: int | None,
    count_tokens: Callable[[str], Awaitable[int]],
) -> list[Request]:
    """The first `count` conversations of usable length; output_len replaces the recorded answer's length."""
    requests: list[Request] = []
    for question, answer in conversations:
        prompt_len = await count_tokens(question)
        wanted = output_len or await count_tokens(answer)
        if (
            min(prompt_len, wanted) >= SHORTEST
            and prompt_len <= LONGEST_PROMPT
            and prompt_len + wanted <= LONGEST_TOTAL
        ):
            requests.append(Request(question, wanted))
        if len(requests) == count:
            return requests
    raise UserError(f"the data set has {len(requests)} conversations of usable length, {count} are needed")


def arrival_times(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """Seconds from the start at which each request is sent.

    The gaps are gamma distributed with mean 1 / rate and shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, more is steadier. An infinite rate sends all at once.
    """
    if rate == float("inf"):
        return [0.0] * count
    gaps = np.random.default_rng(seed).gamma(burstiness, 1 / (rate * burstiness), size=count)
    return np.cumsum(gaps).tolist()
