#!/usr/bin/env python
"""Where a step's time goes: products, attention, the operations between, sampling, building the batch.

    GOMP_SPINCOUNT=0 python scripts/profile_step.py [MODEL] [--batch 32] [--prompt 100] [--output 128] [--reference]

runs prompts through a model runner with hand-written plans, first prefill in chunks, then decode in one batch, and
prints the median time of a step by part. --reference also times transformers on the same decode, in the same run.
"""

import argparse
import os
import random
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read when torch loads

import torch

from baton.proto.config import BatchConfig, CacheConfig, ModelConfig, WorkerConfig
from baton.proto.messages import SamplingParams
from baton.worker.model_runner import ModelRunner
from baton.worker.plan import Row, SlotInit, StepPlan
from baton.worker.weights.resolve import resolve

PARTS = {
    "linear": "products",
    "gated_linear": "products",
    "paged_attention": "attention",
    "rope_and_cache": "rotary + KV write",
    "rms_norm": "norms",
    "silu_and_mul": "SwiGLU",
    "embedding": "embedding",
}


class Timer:
    """Adds up wall time by part; what a timed call spends in other timed calls counts there only."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = 0.0

    def watch(self, owner: Any, name: str, part: str) -> None:
        """Replace the method `name` of an object by one that is timed."""
        original = getattr(owner, name)

        def timed(*args: Any) -> Any:
            started, outside = time.perf_counter(), self._inside
            self._inside = 0.0
            result = original(*args)
            elapsed = time.perf_counter() - started
            self.seconds[part] += elapsed - self._inside
            self._inside = outside + elapsed
            return result

        setattr(owner, name, timed)


class Profile:
    """A runner whose parts are timed; one dict of seconds per step."""

    def __init__(self, path: Path, args: argparse.Namespace) -> None:
        config = ModelConfig(path=str(path), served_names=("m",), load_format=args.load_format)
        self.runner = ModelRunner(
            WorkerConfig(
                name="profile",
                role="unified",
                model=config,
                cache=CacheConfig(block_size=args.block_size),
                batch=BatchConfig(max_num_seqs=args.batch),
                threads=args.threads,
            )
        )
        self.blocks_per_stream = -(-(args.prompt + args.output) // args.block_size)
        self.runner.attach_pool(torch.zeros(self.blocks_per_stream * args.batch, *self.runner.layout.groups[0].shape))
        self.timer = Timer()
        for name, part in PARTS.items():
            self.timer.watch(self.runner._loaded.ops, name, part)
        self.timer.watch(self.runner._slots, "build_batch", "batch building")
        self.timer.watch(self.runner._sampler, "sample", "sampling")
        self.number = 0

    def step(self, rows: list[Row], inits: list[SlotInit]) -> dict[str, float]:
        """Seconds by part, `total` among them."""
        self.timer.seconds.clear()
        self.number += 1
        started = time.perf_counter()
        self.runner.execute(StepPlan(self.number, rows, inits))
        total = time.perf_counter() - started
        seconds = self.timer.seconds
        return {**seconds, "Python and the rest": total - sum(seconds.values()), "total": total}

    def run(self, args: argparse.Namespace) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """Prefill in chunks of the token budget, then decode: the steps' times."""
        params = SamplingParams(max_tokens=args.output, temperature=args.temperature, top_k=args.top_k)
        prompts = [[random.randrange(self.runner.vocab_size) for _ in range(args.prompt)] for _ in range(args.batch)]
        tables = [
            list(range(slot * self.blocks_per_stream, (slot + 1) * self.blocks_per_stream))
            for slot in range(args.batch)
        ]
        inits = [SlotInit(i, (0, i), 0, params, args.prompt, prompts[i], tables[i]) for i in range(args.batch)]
        prefill = [self.step(rows, inits if index == 0 else []) for index, rows in enumerate(_chunks(prompts, args))]
        decode = []
        for index in range(1, args.output):
            position = args.prompt + index - 1
            rows = [Row(slot, position, 1, [], True, [], True, index) for slot in range(args.batch)]
            decode.append(self.step(rows, []))
        return prefill, decode


def _chunks(prompts: list[list[int]], args: argparse.Namespace) -> list[list[Row]]:
    """Rows of each prefill step: prompts in order, cut where the token budget of a step ends."""
    steps: list[list[Row]] = [[]]
    budget = args.max_num_batched_tokens
    for slot, prompt in enumerate(prompts):
        start = 0
        while start < len(prompt):
            if budget == 0:
                steps.append([])
                budget = args.max_num_batched_tokens
            count = min(budget, len(prompt) - start)
            last = start + count == len(prompt)
            steps[-1].append(Row(slot, start, count, prompt[start : start + count], False, [], last, 0))
            start, budget = start + count, budget - count
    return steps


def _print(name: str, steps: list[dict[str, float]]) -> None:
    print(f"{name}: {len(steps)} steps, median milliseconds")
    medians = {part: statistics.median(step.get(part, 0.0) for step in steps) for part in steps[-1]}
    for part, seconds in sorted(medians.items(), key=lambda item: item[1]):
        print(f"  {part:20} {seconds * 1e3:8.2f}  {seconds / medians['total']:6.1%}")


def _reference(path: Path, args: argparse.Namespace) -> float:
    """Output tokens per second of a plain transformers decode loop, greedy, without its prefill."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = torch.randint(0, model.config.vocab_size, (args.batch, args.prompt))
    with torch.inference_mode():
        output = model(ids, use_cache=True)
        started = time.perf_counter()
        for _ in range(args.output - 1):
            output = model(output.logits[:, -1:].argmax(-1), past_key_values=output.past_key_values, use_cache=True)
        elapsed = time.perf_counter() - started
    return args.batch * (args.output - 1) / elapsed


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--max-num-batched-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--reference", action="store_true")
    args = parser.parse_args()
    path = resolve(args.model)
    profile = Profile(path, args)
    prefill, decode = profile.run(args)
    _print("prefill", prefill)
    _print("decode", decode)
    prefill_s = sum(step["total"] for step in prefill)
    decode_s = sum(step["total"] for step in decode)
    whole = args.batch * args.output / (prefill_s + decode_s)
    print(
        f"prefill {args.batch * args.prompt / prefill_s:.0f} tok/s, "
        f"decode {args.batch * (args.output - 1) / decode_s:.1f} tok/s"
    )
    print(f"end to end {whole:.1f} output tok/s")
    if args.reference:
        reference = _reference(path, args)
        print(f"transformers decode without prefill {reference:.1f} tok/s: ratio {whole / reference:.2f}")


if __name__ == "__main__":
    main()
