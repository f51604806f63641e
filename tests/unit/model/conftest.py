"""A model runner driven by hand-written plans, without a batcher."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.kernels import vector_math
from baton.proto.config import BatchConfig, CacheConfig, ModelConfig, WorkerConfig
from baton.proto.messages import SamplingParams, TokenLogprobs
from baton.worker.model_runner import ModelRunner
from baton.worker.plan import Row, SlotInit, StepPlan
from baton.worker.weights.resolve import resolve

vector_math.settle()  # what transformers computes in these tests is the reference


class Driver:
    """Runs streams through a ModelRunner, all in one batch, with blocks given out in reverse order."""

    def __init__(self, path: Path, num_blocks: int = 200, block_size: int = 16, **model: object) -> None:
        config = ModelConfig(path=str(path), served_names=("m",), **model)  # type: ignore[arg-type]
        cache, batch = CacheConfig(block_size=block_size), BatchConfig(max_num_seqs=256)
        self.runner = ModelRunner(WorkerConfig(name="w", role="unified", model=config, cache=cache, batch=batch))
        shape = self.runner.layout.groups[0].shape
        dtype = getattr(torch, self.runner.layout.groups[0].dtype)
        self.runner.attach_pool(torch.zeros(num_blocks, *shape, dtype=dtype))
        self.block_size = block_size
        self.free = list(range(num_blocks))
        self.step = 0

    def generate(
        self, prompts: list[list[int]], params: SamplingParams, chunk: int = 10**9
    ) -> tuple[list[list[int]], list[list[TokenLogprobs]]]:
        """Prefill every prompt in chunks, then decode max_tokens in one batch. Returns tokens and logprobs."""
        outputs: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[TokenLogprobs]] = [[] for _ in prompts]
        done = [0] * len(prompts)
        held = [0] * len(prompts)
        for _ in range(max(map(len, prompts)) + params.max_tokens):
            rows, owners, inits = [], [], []
            for slot, prompt in enumerate(prompts):
                if len(outputs[slot]) == params.max_tokens:
                    continue
                start = done[slot]
                if start == 0:
                    inits.append(SlotInit(slot, (0, slot), 0, params, len(prompt), prompt, []))
                decoding = start >= len(prompt)
                tokens = [] if decoding else prompt[start : start + chunk]
                count = len(tokens) or 1
                blocks = [self.free.pop() for _ in range(-(-(start + count) // self.block_size) - held[slot])]
                held[slot] += len(blocks)
                done[slot] += count
                samples = done[slot] >= len(prompt)
                rows.append(Row(slot, start, count, tokens, decoding, blocks, samples, len(outputs[slot])))
                owners.append(slot)
            if not rows:
                break
            self.step += 1
            result = self.runner.execute(StepPlan(self.step, rows, inits))
            for index, slot in enumerate(owners):
                outputs[slot] += result.tokens[index]
                logprobs[slot] += result.logprobs.get(index, ())
        return outputs, logprobs


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """SmolLM2-135M-Instruct, converted from GGUF."""
    return resolve("demo")


@pytest.fixture(scope="session")
def make_driver() -> Callable[..., Driver]:
    return Driver
