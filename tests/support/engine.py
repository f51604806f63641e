"""An engine in this process, driven to the end of its streams."""

import random
from collections.abc import Sequence
from pathlib import Path

from baton.proto.config import BatchConfig, CacheConfig, ModelConfig, WorkerConfig
from baton.proto.messages import SamplingParams, TokenLogprobs
from baton.worker.engine import Engine

Streams = tuple[list[list[int]], list[list[TokenLogprobs]]]
"""Tokens and log-probabilities per prompt."""


def make_engine(
    path: Path,
    dtype: str = "float32",
    device: str = "cuda",
    max_num_seqs: int = 32,
    num_blocks: int = 2000,
    caching: bool = False,
    batch_invariant: bool = False,
    max_model_len: int = 0,
    **batch: int,
) -> Engine:
    """One unified worker without a server; `batch` are fields of BatchConfig."""
    return Engine(
        WorkerConfig(
            name="w",
            role="unified",
            model=ModelConfig(
                path=str(path),
                served_names=("m",),
                dtype=dtype,
                batch_invariant=batch_invariant,
                max_model_len=max_model_len,
            ),
            cache=CacheConfig(num_blocks=num_blocks, enable_prefix_caching=caching),
            # Without a target, which chunks a prompt is cut into follows from the budget alone.
            batch=BatchConfig(max_num_seqs=max_num_seqs, target_itl_ms=0.0, **batch),
            device=device,
        )
    )


def random_prompts(count: int, lengths: Sequence[int] = (1, 5, 40, 150, 600)) -> list[list[int]]:
    """Prompts for a vocabulary of 3,000."""
    return [[random.randrange(3, 3000) for _ in range(random.choice(lengths))] for _ in range(count)]


def generate(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> Streams:
    """All at once, to their ends."""
    outputs: list[list[int]] = [[] for _ in prompts]
    logprobs: list[list[TokenLogprobs]] = [[] for _ in prompts]
    base = random.randrange(2**40)
    for index, (prompt, wishes) in enumerate(zip(prompts, params, strict=True)):
        engine.add((base, index), wishes, prompt)
    finished = 0
    while finished < len(prompts):
        for row in engine.step():
            outputs[row.sid[1]] += row.tokens
            logprobs[row.sid[1]] += row.logprobs
            finished += row.finish is not None
    return outputs, logprobs


def preemptions(engine: Engine) -> int:
    """How many streams had to give way so far."""
    return engine.batcher.load(with_holdings=False).preemptions


def collect_prompt_logprobs(
    engine: Engine, prompts: list[list[int]], params: list[SamplingParams]
) -> list[list[TokenLogprobs] | None]:
    """Of each prompt whose parameters ask for them, from its second token on."""
    told: list[list[TokenLogprobs] | None] = [None] * len(prompts)
    base = random.randrange(2**40)
    for index, (prompt, wishes) in enumerate(zip(prompts, params, strict=True)):
        engine.add((base, index), wishes, prompt)
    finished = 0
    while finished < len(prompts):
        for row in engine.step():
            if row.prompt_logprobs is not None:
                told[row.sid[1]] = row.prompt_logprobs.entries()
            finished += row.finish is not None
    return told
