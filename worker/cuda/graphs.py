"""Decode steps as CUDA graphs: one per batch size of a ladder, all in one memory pool.

A graph replays its kernels without their launches, which on the host cost more than a small step takes on the device. A
step runs in the smallest graph that holds it; rows beyond its own are padding, which is computed and written nowhere.
"""

from bisect import bisect_left
from collections.abc import Callable

import torch

MAX_SIZE = 1024


def ladder(max_num_seqs: int) -> list[int]:
    """Batch sizes: every one that saves a sensible share of the work, up to max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, MAX_SIZE + 1, 64)]
    largest = min(max_num_seqs, MAX_SIZE)
    return [size for size in sizes if size < largest] + [largest]


class DecodeGraphs:
    """`run(size)` enqueues one decode step of `size` rows and returns its hidden states; it is captured once a size."""

    def __init__(self, run: Callable[[int], torch.Tensor], sizes: list[int]) -> None:
        self._run = run
        self.sizes = sizes
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def capture(self, sizes: list[int] | None = None) -> None:
        """Capture, largest first, so that the others fit into its memory."""
        for size in sorted(sizes or self.sizes, reverse=True):
            self._run(size)  # compiles, and lets libraries make their workspaces
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                hidden = self._run(size)
            self._graphs[size] = graph, hidden

    def size_for(self, rows: int) -> int | None:
        """The size that a step of so many rows runs in, or None when it is beyond the ladder."""
        index = bisect_left(self.sizes, rows)
        return self.sizes[index] if index < len(self.sizes) else None

    def replay(self, size: int) -> torch.Tensor:
        """Run the step whose inputs were copied last; its hidden states [size, hidden], until the next replay."""
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden
