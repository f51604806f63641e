#!/usr/bin/env python
"""Attention kernels alone on a GPU: prefill in TFLOP/s (causal pairs only), decode in ms and GB/s of KV read.

    python scripts/bench_attention.py [--head-dim 128] [--heads 32] [--kv-heads 8] [--block-size 16]

bfloat16, one layer at a time out of 8, blocks scattered; median of 7. FlashAttention-3 is there with the extra `fa3`.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from baton.kernels.cuda import attention, fa3_attention
from baton.kernels.cuda.fa3_attention import Sequences
from baton.kernels.cuda.ops import AttentionWork, CudaOps
from baton.worker.attention.gpu import HOPPER

LAYERS = 8
PREFILL = {
    "8 x 1,024": [(0, 1024)] * 8,
    "4 x 2,048": [(0, 2048)] * 4,
    "1 x 8,000": [(0, 8000)],
    "2,048 after 6,144": [(6144, 2048)],
    "80 x 100": [(0, 100)] * 80,
    "512 after 7,000": [(7000, 512)],
    "512 after 120,000": [(120_000, 512)],
}
"""(cached, new) tokens of each sequence."""


def decode_cases() -> dict[str, list[int]]:
    """Context lengths."""
    spread = np.random.default_rng(0).lognormal(0, 1, 256)
    return {
        "1 x 1,088": [1088],
        "32 x 1,088": [1088] * 32,
        "256 x 1,088": [1088] * 256,
        "31 x 512 + 16,000": [512] * 31 + [16_000],
        "256 log-normal": np.maximum(1, spread * 1088 / spread.mean()).astype(int).tolist(),
        "1 x 100,000": [100_000],
    }


class Case:
    """Random queries and a pool that holds what they attend to."""

    def __init__(self, chunks: list[tuple[int, int]], args: argparse.Namespace) -> None:
        size = args.block_size
        self.chunks, self.args = chunks, args
        blocks = [-(-(cached + new) // size) for cached, new in chunks]
        shape = (sum(blocks), args.kv_heads, LAYERS, 2, size, args.head_dim)
        self.pool = torch.empty(shape, device="cuda", dtype=torch.bfloat16).normal_()
        self.tables = torch.zeros(len(chunks), -(-max(blocks) // 4) * 4, dtype=torch.int32, device="cuda")
        for row, part in enumerate(torch.randperm(sum(blocks), dtype=torch.int32, device="cuda").split(blocks)):
            self.tables[row, : len(part)] = part
        counts = torch.tensor([new for _, new in chunks])
        self.starts = torch.cat([torch.zeros(1), counts.cumsum(0)]).to("cuda", torch.int32)
        self.seq_lens = torch.tensor([sum(chunk) for chunk in chunks], dtype=torch.int32, device="cuda")
        heads = args.heads + 2 * args.kv_heads
        qkv = torch.randn(int(counts.sum()), heads, args.head_dim, device="cuda", dtype=torch.bfloat16)
        self.query = qkv[:, : args.heads]
        self.longest = int(counts.max())

    @property
    def tflop(self) -> float:
        """Of one layer."""
        pairs = sum(new * cached + new * (new + 1) / 2 for cached, new in self.chunks)
        return 4e-12 * self.args.heads * self.args.head_dim * pairs

    @property
    def gigabytes(self) -> float:
        """KV of one layer."""
        return 4e-9 * self.args.kv_heads * self.args.head_dim * int(self.seq_lens.sum())

    def plan(self, ops: CudaOps) -> AttentionWork:
        """The lists, or the sequences for FlashAttention-3."""
        if ops.takes_sequences:
            return AttentionWork(
                self.tables, {}, Sequences(self.starts, self.seq_lens, self.tables, max_query_len=self.longest)
            )
        return ops.plan(self.query, self.pool, self.starts, self.seq_lens, self.tables)

    def milliseconds(self, ops: CudaOps) -> float:
        """Of one layer."""
        planned = self.plan(ops)
        return _time(
            lambda layer: ops.paged_attention(
                self.query,
                self.pool,
                layer,
                self.starts,
                self.seq_lens,
                self.tables,
                self.args.head_dim**-0.5,
                planned,
            )
        )


def _time(run: Callable[[int], Any]) -> float:
    """Milliseconds of one layer, in a graph over all: launches would hide the small ones."""
    run(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in range(LAYERS):
            run(layer)
    times = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / LAYERS)
    return statistics.median(times)


def kernels() -> dict[str, CudaOps]:
    """By name, what runs on this GPU."""
    found = {"triton": CudaOps(prefill=attention.prefill)}
    if torch.cuda.get_device_capability() == HOPPER:
        from baton.kernels.cuda import hopper_attention

        found["gluon"] = CudaOps(prefill=hopper_attention.prefill)
        if fa3_attention.installed():
            found["fa3"] = CudaOps(takes_sequences=True)
    return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--block-size", type=int, default=16)
    args = parser.parse_args()
    print(torch.cuda.get_device_name(), args)
    every = kernels()
    for name, chunks in PREFILL.items():
        case = Case(chunks, args)
        figures = [f"{kernel} {case.tflop / case.milliseconds(ops) * 1e3:.0f}" for kernel, ops in every.items()]
        print(f"prefill {name}: TFLOP/s {', '.join(figures)}", flush=True)
    for name, lengths in decode_cases().items():
        case = Case([(length - 1, 1) for length in lengths], args)
        figures = []
        for kernel, ops in every.items():
            if kernel != "gluon":  # for prompts only
                ms = case.milliseconds(ops)
                figures.append(f"{kernel} {ms:.4f} ms, {case.gigabytes / ms * 1e3:.0f} GB/s")
        print(f"decode {name}: {'; '.join(figures)}", flush=True)


if __name__ == "__main__":
    main()
