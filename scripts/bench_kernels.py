#!/usr/bin/env python
"""The C kernels beside torch, on SmolLM2-135M's shapes: the products of a whole step, attention, and drawing tokens.

    GOMP_SPINCOUNT=0 python scripts/bench_kernels.py [--threads 2] [--rounds 7]

Both sides alternate in one run and the fastest of the rounds counts, because the machine may be shared.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # read when torch loads

import torch

from baton.kernels.cpu.build import build
from baton.kernels.cpu.ops import CpuOps
from baton.kernels.ops import Ops, PackedWeight
from baton.kernels.reference import TorchOps

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 30, 9, 3, 64, 49152
PRODUCTS = ((960, 576, LAYERS), (576, 576, LAYERS), (3072, 576, LAYERS), (576, 1536, LAYERS), (VOCAB, 576, 1))
"""(output features, input features, how many) of qkv, attention output, gate and up, down, vocabulary."""


def fastest(rounds: int, *candidates: Callable[[], object]) -> list[float]:
    """Milliseconds of each candidate's fastest call, in turns."""
    best = [float("inf")] * len(candidates)
    for _ in range(rounds + 1):  # the first warms up caches and threads
        for index, candidate in enumerate(candidates):
            started = time.perf_counter()
            candidate()
            best[index] = min(best[index], time.perf_counter() - started)
    return [seconds * 1e3 for seconds in best]


def _multiply(ops: Ops, inputs: list[torch.Tensor], weights: list[list[PackedWeight]]) -> None:
    for x, same in zip(inputs, weights, strict=True):
        for weight in same:
            ops.linear(x, weight, None)


def _attend(
    ops: Ops, query: torch.Tensor, pool: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor, tables: torch.Tensor
) -> None:
    for layer in range(LAYERS):
        ops.paged_attention(query, pool, layer, starts, lengths, tables, HEAD_DIM**-0.5)


def products(ops: CpuOps, rounds: int) -> None:
    """All matrix products of one step, by the number of tokens in it."""
    weights = [[torch.randn(rows, features) for _ in range(count)] for rows, features, count in PRODUCTS]
    plain = [[TorchOps().pack(weight) for weight in same] for same in weights]
    packed = [[ops.pack(weight) for weight in same] for same in weights]
    flops = sum(2 * rows * features * count for rows, features, count in PRODUCTS)
    print("products of a step: tokens, torch ms, C ms, C GFLOP/s")
    for tokens in (1, 8, 32, 64, 256):
        inputs = [torch.randn(tokens, features) for _, features, _ in PRODUCTS]
        torch_ms, c_ms = fastest(
            rounds, partial(_multiply, TorchOps(), inputs, plain), partial(_multiply, ops, inputs, packed)
        )
        print(f"  {tokens:4} {torch_ms:8.1f} {c_ms:8.1f} {flops * tokens / c_ms / 1e6:8.0f}")


def attention(ops: CpuOps, rounds: int) -> None:
    """Attention of all layers: sequences, context, new tokens of each."""
    print("attention of a step: sequences, context, new tokens, torch ms, C ms, GB/s of KV read by C")
    for sequences, context, new in ((32, 164, 1), (1, 164, 1), (1, 4096, 1), (32, 1024, 1), (1, 2048, 256)):
        width = -(-context // 16)
        pool = torch.randn(sequences * width, KV_HEADS, LAYERS, 2, 16, HEAD_DIM)
        query = torch.randn(sequences * new, HEADS, HEAD_DIM)
        starts = (torch.arange(sequences + 1) * new).int()
        lengths = torch.full((sequences,), context).int()
        tables = torch.randperm(sequences * width).reshape(sequences, width).int()

        arguments = (query, pool, starts, lengths, tables)
        torch_ms, c_ms = fastest(rounds, partial(_attend, TorchOps(), *arguments), partial(_attend, ops, *arguments))
        read = sequences * context * KV_HEADS * LAYERS * 2 * HEAD_DIM * 4
        print(f"  {sequences:3} {context:5} {new:4} {torch_ms:8.1f} {c_ms:8.1f} {read / c_ms / 1e6:6.1f}")


def draws(ops: CpuOps, rounds: int) -> None:
    """One token for each of 32 rows."""
    print("drawing 32 tokens: kind, torch ms, C ms")
    rows = 32
    logits = torch.randn(rows, VOCAB) * 3
    off = {"top_k": torch.zeros(rows, dtype=torch.int64), "top_p": torch.ones(rows, dtype=torch.float64)}
    kinds = {
        "temperature": off,
        "top_k 50": off | {"top_k": torch.full((rows,), 50)},
        "top_p 0.9": off | {"top_p": torch.full((rows,), 0.9, dtype=torch.float64)},
    }
    for name, kind in kinds.items():
        arguments = (logits, torch.ones(rows), *kind.values(), torch.zeros(rows), torch.rand(rows).double())
        torch_ms, c_ms = fastest(rounds, partial(TorchOps().draw, *arguments), partial(ops.draw, *arguments))
        print(f"  {name:12} {torch_ms:8.1f} {c_ms:8.1f}")


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ops = CpuOps(build(), args.threads)
    for bench in (products, attention, draws):
        bench(ops, args.rounds)


if __name__ == "__main__":
    main()
