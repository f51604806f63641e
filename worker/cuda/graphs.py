"""Steps as CUDA graphs, one per size of two ladders, all in one memory pool.

A graph replays its kernels without their launches, which on the host cost more than a small step takes on the device.
Decode steps are captured with their sampling, by the number of rows. Steps with prompt chunks are captured up to
MIXED_TOKENS, by the number of tokens, and end with the hidden states: their sampling is a few launches beside
milliseconds of work. Large ones are captured twice, because few of a chunk's tokens need the last layer. A step runs in
the smallest graph that holds it; what is beyond its own is padding, which is computed and written nowhere. A step that
fits no graph runs the same kernels one by one.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

DECODE_ROWS = 1024
MIXED_TOKENS = 1024
"""Beyond it a step takes longer on the device than its launches on the host."""
FEW_WANTED = 256
"""Tokens that a mixed step of more may want hidden states of in its narrow graph: for fewer, products take as long."""


@dataclass(frozen=True, slots=True)
class Size:
    """What one graph holds: decode rows, or tokens of a step in which anything goes."""

    tokens: int
    wanted: int
    """Of them whose hidden states come out, and at most so many rows of one token; in a decode step all are both."""
    mixed: bool


def decode_sizes(max_num_seqs: int) -> list[Size]:
    """Rows: every count that saves a sensible share of the work, up to max_num_seqs."""
    sizes = [1, 2, 4, *range(8, 128, 8), *range(128, 256, 16), *range(256, 512, 32), *range(512, DECODE_ROWS + 1, 64)]
    return [Size(rows, rows, mixed=False) for rows in _up_to(sizes, min(max_num_seqs, DECODE_ROWS))]


def mixed_sizes(max_tokens: int, max_num_seqs: int) -> list[Size]:
    """For each of mixed_tokens a graph of which as many tokens are wanted as there can be streams, and one of few."""
    return [
        Size(tokens, wanted, mixed=True)
        for tokens in mixed_tokens(max_tokens)
        for wanted in sorted({min(tokens, max_num_seqs), min(tokens, max_num_seqs, FEW_WANTED)})
    ]


def mixed_tokens(max_tokens: int) -> list[int]:
    """Tokens of mixed steps, up to max_tokens. Products take them in tiles of 64 or 128 rows: finer steps would save
    nothing, and cuBLAS takes longer for 448 tokens than for 512."""
    sizes = [*range(16, 64, 16), *range(64, 256, 32), *range(256, 448, 64), *range(512, 896, 128), MIXED_TOKENS]
    return _up_to(sizes, min(max_tokens, MIXED_TOKENS))


def _up_to(sizes: list[int], largest: int) -> list[int]:
    return [size for size in sizes if size < largest] + [largest]


class StepGraphs:
    """`run(size)` enqueues a step of this size and returns its hidden states; it is captured once a size, after
    `blank(size)` has made its inputs those of a step of nothing."""

    def __init__(
        self,
        blank: Callable[[Size], None],
        run: Callable[[Size], torch.Tensor],
        decode: list[Size],
        mixed: list[Size],
    ) -> None:
        self._blank, self._run = blank, run
        self.decode, self.mixed = decode, mixed
        self._graphs: dict[Size, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()

    @property
    def sizes(self) -> list[Size]:
        """Largest first, so that each fits into the memory of those before it."""
        return sorted(self.mixed + self.decode, key=lambda size: (size.tokens, size.mixed, size.wanted), reverse=True)

    def capture(self, sizes: list[Size] | None = None) -> None:
        """Capture these sizes, or all."""
        for size in self.sizes if sizes is None else sizes:
            self._blank(size)
            self._run(size)  # compiles, and lets libraries make their workspaces
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):
                hidden = self._run(size)
            self._graphs[size] = graph, hidden

    def largest(self) -> list[Size]:
        """The sizes that need the most memory."""
        return [self.mixed[-1], self.decode[-1]]

    def fit(self, tokens: int, wanted: int, mixed: bool) -> Size | None:
        """The size that such a step runs in, or None when it is beyond the ladder or nothing was captured."""
        if not self._graphs:
            return None
        ladder = self.mixed if mixed else self.decode
        return next((size for size in ladder if size.tokens >= tokens and size.wanted >= wanted), None)

    def replay(self, size: Size) -> torch.Tensor:
        """Run the step whose inputs were copied last; its hidden states [rows, hidden], until the next replay."""
        graph, hidden = self._graphs[size]
        graph.replay()
        return hidden
