#!/usr/bin/env python
"""The offline rows of the GPU table, through baton.frontend.LLM: throughput, latency, prefill, step times.

    python scripts/bench_gpu_offline.py MODEL_DIR [--rows A1 A5 … D1] [--batch-invariant] [--json FILE]

MODEL_DIR needs config.json and tokenizer files only: weights are random. Greedy, bfloat16, no prefix cache.
"""

import argparse
import gc
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from baton.frontend.llm import LLM, SamplingParams
from baton.kernels.cuda.ops import CudaOps
from baton.proto.config import BatchConfig, CacheConfig
from baton.proto.messages import SamplingParams as Params


class Bench:
    """One engine and the rows measured on it."""

    def __init__(self, model: str, max_num_seqs: int, batch_invariant: bool) -> None:
        self.llm = LLM(
            model,
            dtype="bfloat16",
            batch_invariant=batch_invariant,
            load_format="dummy",
            max_model_len=8192,
            device="cuda",
            cache=CacheConfig(enable_prefix_caching=False),
            batch=BatchConfig(max_num_seqs=max_num_seqs, target_itl_ms=0.0),
        )
        self.engine = self.llm._engine
        self.results: dict[str, float] = {}
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
        self.results["A3 ms/token"] = self._ms_per_token()

    def _ms_per_token(self) -> float:
        """Of one stream, without its prompt."""
        short, long = (statistics.median(self._generate(1, 100, n) for _ in range(3)) for n in (16, 144))
        return (long - short) / 128 * 1000

    def a4(self) -> None:
        self.results["A4 tok/s"] = 32 * 2048 / self._generate(32, 2048, 1)

    def a5(self) -> None:
        self._steps("A5")

    def d1(self) -> None:
        self.results["D1 ms/token"] = self._ms_per_token()
        self._steps("D1")

    def _steps(self, row: str) -> None:
        for batch in (32, 128, 256):
            times = self._step_times(batch, 1056, 64)
            self.results[f"{row} batch {batch} ms"] = statistics.median(times) * 1000

    def _step_times(self, batch: int, length: int, steps: int) -> list[float]:
        """Seconds between the results of successive decode steps of the whole batch."""
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

    def c1(self) -> None:
        self.results["C1 KV tokens"] = self.engine.batcher.pool.num_blocks * 16

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--rows", nargs="+", default=["A1", "A2", "A3", "A4", "A5", "A5r", "A6", "C1"])
    parser.add_argument("--max-num-seqs", type=int, default=1024)
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results: dict[str, float] = {}
    if "A5r" in args.rows:
        results |= ragged_attention()
        torch.cuda.empty_cache()
    if wanted := [row for row in args.rows if row != "A5r"]:
        bench = Bench(args.model, args.max_num_seqs, args.batch_invariant)
        gc.freeze()
        for row in wanted:
            getattr(bench, row.lower())()
        results |= bench.results
        bench.close()
    for name, value in results.items():
        print(f"{name:28} {value:12,.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
