#!/usr/bin/env python
"""The offline rows of the GPU table, through baton.frontend.LLM's engine: throughput, latency, prefill, step times.

    scripts/bench_gpu.sh MODEL_DIR [--rows A1 A5 …] [--json FILE] [--profile]

MODEL_DIR needs config.json and tokenizer files only: weights are random. Greedy, bfloat16, no prefix cache.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from baton.frontend.llm import LLM, SamplingParams
from baton.kernels.cuda.ops import CudaOps
from baton.proto.config import BatchConfig, CacheConfig

VLLM_H100 = {
    "A1 out tok/s": 12_900,
    "A2 out tok/s": 3_690,
    "A3 ms/token": 6.52,
    "A4 tok/s": 42_500,
    "A5 batch 32 ms": 8.43,
    "A5 batch 128 ms": 13.80,
    "A5 batch 256 ms": 21.26,
    "A5r 31x512+16000 ms": 1.91,
    "A5r log-normal ms": 9.70,
    "A6 ms": 217,
}
"""vLLM 0.26.0 on one H100 80 GB, 2026-11-23; a GPU with faster memory has to be judged by other figures."""


class Bench:
    """One engine and the rows measured on it."""

    def __init__(self, model: str, max_num_seqs: int) -> None:
        started = time.monotonic()
        self.llm = LLM(
            model,
            dtype="bfloat16",
            load_format="dummy",
            max_model_len=8192 + 64,
            device="cuda",
            cache=CacheConfig(enable_prefix_caching=False),
            batch=BatchConfig(max_num_seqs=max_num_seqs, target_itl_ms=0.0),
        )
        self.engine = self.llm._engine
        self.results: dict[str, float] = {
            "start s": time.monotonic() - started,
            "KV tokens": self.engine.batcher.pool.num_blocks * 16,
        }
        self._generate(8, 64, 8)

    def _prompts(self, count: int, length: int) -> list[list[int]]:
        return [[random.randrange(100, 10_000) for _ in range(length)] for _ in range(count)]

    def _generate(self, count: int, length: int, output: int) -> float:
        """Seconds for `count` random prompts of `length` tokens."""
        prompts = self._prompts(count, length)
        params = SamplingParams(temperature=0.0, max_tokens=output, ignore_eos=True)
        started = time.perf_counter()
        outputs = self.llm.generate(prompts, params)
        elapsed = time.perf_counter() - started
        assert all(len(one.outputs[0].token_ids) == output for one in outputs)
        return elapsed

    def a1(self) -> None:
        self.results["A1 out tok/s"] = 1000 * 128 / self._generate(1000, 100, 128)

    def a2(self) -> None:
        self.results["A2 out tok/s"] = 256 * 128 / self._generate(256, 1024, 128)

    def a3(self) -> None:
        short, long = (statistics.median(self._generate(1, 100, n) for _ in range(3)) for n in (16, 144))
        self.results["A3 ms/token"] = (long - short) / 128 * 1000

    def a4(self) -> None:
        self.results["A4 tok/s"] = 32 * 2048 / self._generate(32, 2048, 1)

    def a5(self) -> None:
        for batch in (32, 128, 256):
            times = self._step_times(batch, 1056, 64)
            self.results[f"A5 batch {batch} ms"] = statistics.median(times) * 1000

    def _step_times(self, batch: int, length: int, steps: int) -> list[float]:
        """Seconds between the results of successive decode steps of the whole batch."""
        from baton.proto.messages import SamplingParams as Params

        for index, prompt in enumerate(self._prompts(batch, length)):
            self.engine.add((9, index), Params(max_tokens=steps + 8, temperature=0.0), prompt)
        times, last = [], 0.0
        while rows := self.engine.step():
            now = time.perf_counter()
            if len(rows) == batch:
                times.append(now - last)
            last = now
        while self.engine.step():
            pass
        return times[8:-4]

    def a6(self) -> None:
        self.results["A6 ms"] = statistics.median(self._generate(1, 8000, 1) for _ in range(3)) * 1000

    def close(self) -> None:
        self.llm.close()


def ragged_attention() -> dict[str, float]:
    """Row A5r: decode attention alone, of the 8B shape, for 32 layers."""
    generator = np.random.default_rng(0)
    spread = generator.lognormal(0, 1, 256)
    cases = {
        "A5r 31x512+16000 ms": [512] * 31 + [16_000],
        "A5r log-normal ms": np.maximum(1, spread * 1088 / spread.mean()).astype(int).tolist(),
        "uniform 32x1088 ms": [1088] * 32,
        "uniform 128x1088 ms": [1088] * 128,
        "uniform 256x1088 ms": [1088] * 256,
        "single 8000 ms": [8000],
    }
    return {name: _attention_ms(lengths) for name, lengths in cases.items()}


def _attention_ms(lengths: list[int]) -> float:
    layers, ops = 32, CudaOps()
    width = -(-max(lengths) // 16)
    blocks = [-(-length // 16) for length in lengths]
    pool = torch.randn(sum(blocks), 8, layers, 2, 16, 128, device="cuda", dtype=torch.bfloat16)
    order = torch.randperm(sum(blocks), dtype=torch.int32, device="cuda")
    tables = torch.zeros(len(lengths), width, dtype=torch.int32, device="cuda")
    for row, part in enumerate(order.split(blocks)):
        tables[row, : len(part)] = part
    query = torch.randn(len(lengths), 32, 128, device="cuda", dtype=torch.bfloat16)
    starts = torch.arange(len(lengths) + 1, dtype=torch.int32, device="cuda")
    seq_lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    planned = ops.plan(query, pool, starts, seq_lens, tables)

    def run() -> None:
        for layer in range(layers):
            ops.paged_attention(query, pool, layer, starts, seq_lens, tables, 128**-0.5, planned)

    return _graph_ms(run)


def _graph_ms(run: Callable[[], None]) -> float:
    """Median milliseconds of a replay."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(20):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def profile(bench: Bench, batch: int, length: int) -> dict[str, Any]:
    """Where the device's time goes in decode steps: microseconds by kernel, and idle time between, per step."""
    from torch.profiler import ProfilerActivity

    from baton.proto.messages import SamplingParams as Params

    for index, prompt in enumerate(bench._prompts(batch, length)):
        bench.engine.add((8, index), Params(max_tokens=64, temperature=0.0), prompt)
    while len(bench.engine.step()) < batch:
        pass
    for _ in range(8):
        bench.engine.step()
    steps = 16
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as trace:
        started = time.perf_counter()
        for _ in range(steps):
            bench.engine.step()
        elapsed = time.perf_counter() - started
    while bench.engine.step():
        pass
    spans = sorted(
        (event.time_range.start, event.time_range.end, event.name)
        for event in trace.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    # A kernel may start before the one ahead of it ends, and waits for it then: what they share counts for that one.
    kernels: dict[str, float] = defaultdict(float)
    gaps, last_end = [], spans[0][0]
    for start, end, name in spans:
        gaps.append(max(0.0, start - last_end))
        kernels[name] += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    busy = sum(kernels.values())
    top = sorted(kernels.items(), key=lambda item: -item[1])[:14]
    return {
        "step ms": elapsed / steps * 1000,
        "busy ms": busy / steps / 1000,
        "gaps over 5 us, us a step": sum(gap for gap in gaps if gap > 5) / steps,
        "largest gap us": max(gaps, default=0.0),
        "kernels us a step": {name[:70]: round(value / steps, 1) for name, value in top},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", nargs="*", default=["A1", "A2", "A3", "A4", "A5", "A5r", "A6"])
    parser.add_argument("--max-num-seqs", type=int, default=512)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--profile", action="store_true", help="also time the kernels of decode steps")
    args = parser.parse_args()
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": Path(args.model).name,
    }
    results: dict[str, float] = {}
    if "A5r" in args.rows:
        results |= ragged_attention()
        torch.cuda.empty_cache()
    if wanted := [row for row in args.rows if row != "A5r"]:
        bench = Bench(args.model, args.max_num_seqs)
        gc.freeze()
        for row in wanted:
            getattr(bench, row.lower())()
        results |= bench.results
        if args.profile:
            report["profile"] = {str(batch): profile(bench, batch, 1000) for batch in (1, 32, 256)}
        bench.close()
    report["results"] = results
    print(json.dumps(report.get("profile", {}), indent=1))
    print(f"{report['device']}, {report['model']}, bfloat16, dummy weights")
    for name, value in results.items():
        print(f"{name:24} {value:12,.2f}   vLLM on an H100: {VLLM_H100.get(name, '-')}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
