"""Which kernel takes a product, in which tiles: measured for each GPU (docs/performance.md), never searched for."""

import functools
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class RowTile:
    """A program of skinny.one_row: weight rows and features that it takes at a time."""

    rows: int
    features: int


@dataclass(frozen=True, slots=True)
class FewTile:
    """A program of skinny.few_rows: rows of the input that it has room for (16 or more), weight rows and features that
    it takes at a time, and loads in flight."""

    count: int
    rows: int
    features: int
    warps: int
    stages: int
    programs: int
    """The features are cut until so many programs share the weights."""

    def splits(self, tiles: int) -> int:
        """Parts that the features are cut into for so many tiles of weight rows."""
        return max(1, min(4, self.programs // tiles))


@dataclass(frozen=True, slots=True)
class ProductTiles:
    """One GPU's choices; what none covers goes to cuBLAS, with separate kernels around it."""

    plain: RowTile
    gated: RowTile
    few: tuple[FewTile, ...]
    """By `count`."""

    def several(self, count: int) -> FewTile:
        """For so many rows of the input, at most most_rows."""
        return next(tile for tile in self.few if count <= tile.count)

    @property
    def most_rows(self) -> int:
        """Rows of the input beyond which cuBLAS is faster."""
        return self.few[-1].count


_BY_CAPABILITY = {
    (9, 0): ProductTiles(
        plain=RowTile(rows=8, features=2048),
        gated=RowTile(rows=4, features=2048),
        few=(
            FewTile(count=16, rows=64, features=128, warps=4, stages=4, programs=264),
            FewTile(count=32, rows=64, features=128, warps=4, stages=5, programs=128),
            FewTile(count=64, rows=64, features=128, warps=4, stages=4, programs=128),
        ),
    ),
}
"""Compute capability -> choices. H100 and H200 are one chip with different memory."""


@functools.cache
def product_tiles() -> ProductTiles | None:
    """Of the current GPU; None for one that was not measured."""
    return _BY_CAPABILITY.get(torch.cuda.get_device_capability()) if torch.cuda.is_available() else None
