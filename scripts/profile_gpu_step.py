#!/usr/bin/env python
"""A decode step's timeline on the GPU: what its kernels take by kind, how long it is idle, what lies between two steps.

    python scripts/profile_gpu_step.py MODEL_DIR [--batch 1 32 256] [--context 1000] [--steps 16] [--batch-invariant]

Random weights, bfloat16, greedy, PyTorch's profiler. Prints a Markdown table in µs a step.
"""

import argparse
import itertools
import random
import re
import statistics
import time
from dataclasses import dataclass, field

import torch
from torch.profiler import ProfilerActivity

from baton.frontend.llm import LLM
from baton.proto.config import BatchConfig, CacheConfig
from baton.proto.messages import SamplingParams

KINDS = {
    "attention": r"^_decode|^_combine|^_prefill|attention|flash",
    "norms": r"rms_norm",
    "rotary and KV write": r"^_rope_and_cache",
    "SwiGLU": r"^_silu_and_mul",
    "sampling": r"^_argmax|^_draw|^_logsumexp",
    "inputs and tokens": r"^_apply_updates|^_prepare|^_store_sampled|^Memcpy|^Memset|indexSelect|index_elementwise",
    "products": r"gemm|gemv|nvjet|splitK|cutlass|^_product|^_one_row|^_few_rows|^_sum_parts",
}
FIRST, LAST = "_prepare", "_store_sampled"
"""The kernels that a decode step begins and ends with; between two steps lie their copies."""


@dataclass
class Timeline:
    """µs a step, of so many steps."""

    kinds: dict[str, float] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)
    """Kernels of no known kind."""
    idle: float = 0.0
    """Between kernels of one step."""
    between: list[float] = field(default_factory=list)
    """From one step's last kernel to the next one's first."""
    step: float = 0.0
    """By the host's clock."""


def trace(llm: LLM, batch: int, context: int, steps: int) -> Timeline:
    """Decode steps of `batch` streams at about `context` tokens."""
    engine = llm._engine
    for index in range(batch):
        prompt = [random.randrange(100, 10_000) for _ in range(context)]
        engine.add((batch, index), SamplingParams(max_tokens=steps + 48, temperature=0.0), prompt)
    while len(engine.step()) < batch:
        pass
    for _ in range(8):
        engine.step()
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler:
        started = time.perf_counter()
        for _ in range(steps):
            engine.step()
        elapsed = time.perf_counter() - started
    while engine.step():
        pass
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    return read(spans, steps, elapsed / steps * 1e6)


def read(spans: list[tuple[float, float, str]], steps: int, step_us: float) -> Timeline:
    """spans: (start, end, name) in µs, sorted."""
    timeline = Timeline(step=step_us)
    busy_until = spans[0][0]
    for start, end, name in spans:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)
        into, key = (timeline.kinds, kind) if kind else (timeline.others, name[:60])
        # A kernel may start before the one ahead of it ends, and waits for it: what they share is that one's.
        into[key] = into.get(key, 0.0) + max(0.0, end - max(start, busy_until)) / steps
        busy_until = max(busy_until, end)
    ended: float | None = None
    within = False
    for (_, end, name), (start, _, following) in itertools.pairwise(spans):
        within = within or name.startswith(FIRST)
        if name.startswith(LAST):
            within, ended = False, end
        if following.startswith(FIRST) and ended is not None:
            timeline.between.append(start - ended)
        if within:
            timeline.idle += max(0.0, start - end) / steps
    return timeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 256])
    parser.add_argument("--context", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch-invariant", action="store_true")
    args = parser.parse_args()
    with LLM(
        args.model,
        dtype="bfloat16",
        load_format="dummy",
        max_model_len=args.context + args.steps + 64,
        batch_invariant=args.batch_invariant,
        device="cuda",
        cache=CacheConfig(enable_prefix_caching=False),
        batch=BatchConfig(max_num_seqs=max(args.batch), target_itl_ms=0.0),
    ) as llm:
        timelines = [trace(llm, batch, args.context, args.steps) for batch in args.batch]
    print(f"\n{torch.cuda.get_device_name()}, context {args.context}, {args.steps} steps, µs a step\n")
    print(f"| | {' | '.join(f'batch {batch}' for batch in args.batch)} |\n|---|{'---|' * len(args.batch)}")
    others = sorted({name for timeline in timelines for name in timeline.others})
    lines = [(kind, [timeline.kinds.get(kind, 0.0) for timeline in timelines]) for kind in KINDS]
    lines += [(f"`{name}`", [timeline.others.get(name, 0.0) for timeline in timelines]) for name in others]
    lines.append(("idle between kernels of a step", [timeline.idle for timeline in timelines]))
    lines.append(("between two steps, median", [statistics.median(timeline.between) for timeline in timelines]))
    lines.append(("between two steps, longest", [max(timeline.between) for timeline in timelines]))
    lines.append(("step, host's clock, profiler on", [timeline.step for timeline in timelines]))
    for name, values in lines:
        print(f"| {name} | {' | '.join(f'{value:,.0f}' for value in values)} |")


if __name__ == "__main__":
    main()
