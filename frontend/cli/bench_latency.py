"""Measure the latency of one batch from its prompts to its last token, with vLLM's option names and result lines."""

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from baton.frontend.bench import dataset
from baton.frontend.cli import bench_args, engine_args, offline
from baton.proto.errors import UserError

if TYPE_CHECKING:
    from baton.frontend.llm import LLM

PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `baton bench latency`."""
    bench_args.add_model(parser)
    # A second run of the same prompts would measure the cache.
    parser.set_defaults(enable_prefix_caching=False)
    number = engine_args.positive
    group = parser.add_argument_group("work")
    group.add_argument("--input-len", type=number, default=32, help="tokens of each prompt")
    group.add_argument("--output-len", type=number, default=128, help="tokens")
    group.add_argument("--batch-size", type=number, default=8, help="prompts")
    group.add_argument("--n", type=number, default=1, help="outputs per prompt")
    group.add_argument("--temperature", type=float, default=0.0)
    group.add_argument("--num-iters-warmup", type=engine_args.count, default=10)
    group.add_argument("--num-iters", type=number, default=30)
    group.add_argument("--output-json", metavar="FILE", help="write the JSON result here")


def run(args: argparse.Namespace) -> int:
    """Generate the batch again and again, print its latencies."""
    bench_args.settle_model(args)
    path = bench_args.checked_path(Path(args.output_json)) if args.output_json else None
    work = dataset.random_work(args.batch_size, args.input_len, args.output_len, 0.0, args.seed)
    prompts = [prompt for prompt, _ in work]
    with offline.load(args) as llm:
        for _ in range(args.num_iters_warmup):
            _latency_s(args, llm, prompts)
        latencies = [_latency_s(args, llm, prompts) for _ in range(args.num_iters)]
    average = float(np.mean(latencies))
    percentiles = dict(zip(PERCENTILES, np.percentile(latencies, PERCENTILES).tolist(), strict=True))
    print(f"Avg latency: {average} seconds")
    for percentile, value in percentiles.items():
        print(f"{percentile}% percentile latency: {value} seconds")
    if path:
        bench_args.write_json(path, {"avg_latency": average, "latencies": latencies, "percentiles": percentiles})
    return 0


def _latency_s(args: argparse.Namespace, llm: "LLM", prompts: list[list[int]]) -> float:
    from baton.frontend import SamplingParams

    params = SamplingParams(n=args.n, max_tokens=args.output_len, temperature=args.temperature, ignore_eos=True)
    started = time.perf_counter()
    try:
        llm.generate(prompts, params)
    except ValueError as error:
        raise UserError(str(error)) from error
    return time.perf_counter() - started
