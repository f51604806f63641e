#!/usr/bin/env python
"""The matrix products of decode layers, with norms, SwiGLU and residual: our kernels for few rows beside cuBLAS.

    python scripts/bench_decode_gpu.py MODEL_DIR [--rows 1 8 16 32] [--layers 8]

MODEL_DIR needs a config.json only. Prints µs a layer and the rate at which its weights are read, in one CUDA graph over
layers that do not fit the L2 cache together, the fastest of ten replays; then the same for the vocabulary.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from baton.kernels.cuda.ops import CudaOps
from baton.kernels.ops import Norm, PackedWeight
from baton.worker.models.llama import LlamaConfig


def replay_us(work: Callable[[], object]) -> float:
    """Microseconds of `work` as a CUDA graph."""
    work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    best = float("inf")
    for _ in range(10):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        best = min(best, started.elapsed_time(ended))
    return best * 1e3


class Layers:
    """Random weights of some layers of a model, bfloat16 on the GPU."""

    def __init__(self, config: LlamaConfig, count: int) -> None:
        self.hidden, self.attended = config.hidden_size, config.num_heads * config.head_dim
        qkv = self.attended + 2 * config.num_kv_heads * config.head_dim
        inner = config.intermediate_size
        shapes = ((qkv, self.hidden), (self.hidden, self.attended), (2 * inner, self.hidden), (self.hidden, inner))
        self.layers = [[_weight(*shape) for shape in shapes] for _ in range(count)]
        self.layer_bytes = sum(weight.data.nbytes for weight in self.layers[0])
        self.vocabulary = _weight(config.vocab_size, self.hidden)
        self.norm = Norm(torch.ones(self.hidden, device="cuda", dtype=torch.bfloat16), 1e-6)

    def run(self, ops: CudaOps, x: torch.Tensor) -> None:
        """All layers without attention: its output is the queries, as they are."""
        for qkv, output, gate_up, down in self.layers:
            queries = ops.linear(x, qkv, None, self.norm).view(-1)[: len(x) * self.attended].view(len(x), -1)
            x = ops.linear(queries, output, None, residual=x)
            x = ops.linear(ops.gated_linear(x, gate_up, None, self.norm), down, None, residual=x)

    def logits(self, ops: CudaOps, x: torch.Tensor) -> None:
        """The vocabulary twice: more than the L2 cache holds."""
        for _ in range(2):
            ops.linear(x, self.vocabulary, None, self.norm)


def _weight(rows: int, features: int) -> PackedWeight:
    return PackedWeight(torch.randn(rows, features, device="cuda", dtype=torch.bfloat16) * features**-0.5, rows)


@torch.inference_mode()
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 2, 8, 16, 32])
    parser.add_argument("--layers", type=int, default=8)
    args = parser.parse_args()
    layers = Layers(LlamaConfig.from_json(json.loads((args.model / "config.json").read_text())), args.layers)
    print(f"{torch.cuda.get_device_name()}, {args.model.name}, bfloat16: µs (GB/s of weights)")
    print("rows   layer, cuBLAS      layer, ours   vocabulary, cuBLAS  vocabulary, ours")
    for rows in args.rows:
        x = torch.randn(rows, layers.hidden, device="cuda", dtype=torch.bfloat16)
        line = f"{rows:4}"
        for work, count, size in (
            (layers.run, args.layers, layers.layer_bytes),
            (layers.logits, 2, layers.vocabulary.data.nbytes),
        ):
            for ops in (CudaOps(skinny_products=False), CudaOps()):
                us = replay_us(partial(work, ops, x)) / count
                line += f"{us:11.2f} ({size / us / 1e3:4.0f})"
        print(line, flush=True)


if __name__ == "__main__":
    main()
