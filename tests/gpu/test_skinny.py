"""Products of few rows with norm, bias, SwiGLU and residual folded in, beside the same in plain torch."""

import os

import pytest
import torch

pytest.importorskip("triton")

from baton.kernels.cuda import elementwise, skinny
from baton.kernels.cuda.ops import CudaOps
from baton.kernels.cuda.tuning import FewTile, RowTile
from baton.kernels.ops import Norm
from baton.kernels.reference import TorchOps

pytestmark = pytest.mark.gpu
# Triton's interpreter gets bfloat16 arithmetic wrong.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HALVES = [torch.float16] + [torch.bfloat16] * (not INTERPRETED)
SHAPES = [(256, 512), (100, 328)]
"""(results, features): one that tiles cover evenly, one that they don't."""
PARTS = [
    "nothing",
    "bias",
    "norm",
    "norm and bias",
    "residual",
    "residual and bias",
    "gated norm",
    "gated norm and bias",
]


class Product:
    """Random operands of one product, and what plain torch makes of them in float32."""

    def __init__(self, device: str, dtype: torch.dtype, count: int, shape: tuple[int, int], parts: str) -> None:
        results, features = shape
        self.gated = "gated" in parts
        rows = results * (2 if self.gated else 1)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, device=device, dtype=dtype)

        self.x, self.weight = random(count, features), random(rows, features) / features**0.5
        self.bias = random(rows) if "bias" in parts else None
        self.norm = Norm(random(features), 1e-5) if "norm" in parts else None
        self.residual = random(count, results) if "residual" in parts else None

    def check(self, actual: torch.Tensor, residual: torch.Tensor | None) -> None:
        """`actual` was computed with `residual`, a copy that may be overwritten."""
        ops = TorchOps()
        norm = None if self.norm is None else Norm(self.norm.weight.float(), self.norm.eps)
        bias = None if self.bias is None else self.bias.float()
        packed = ops.pack(self.weight.float())
        if self.gated:
            expected = ops.gated_linear(self.x.float(), packed, bias, norm)
        else:
            added = None if self.residual is None else self.residual.float()
            expected = ops.linear(self.x.float(), packed, bias, norm, added)
        assert actual.dtype == self.x.dtype
        error = (actual.float() - expected).norm() / expected.norm()
        assert error < {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[actual.dtype]
        if residual is not None:
            assert residual.data_ptr() == actual.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", PARTS)
def test_one_row(device: str, dtype: torch.dtype, shape: tuple[int, int], parts: str) -> None:
    """Features that one piece holds, and several."""
    tile = RowTile(rows=8, features=2048 if shape == SHAPES[0] else 128)
    product = Product(device, dtype, 1, shape, parts)
    residual = None if product.residual is None else product.residual.clone()
    actual = skinny.one_row(product.x, product.weight, product.bias, product.norm, residual, product.gated, tile)
    product.check(actual, residual)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("count", "programs"), [(2, 1), (31, 16)])
def test_few_rows(
    device: str, dtype: torch.dtype, shape: tuple[int, int], parts: str, count: int, programs: int
) -> None:
    """With the features in one part and in several."""
    product = Product(device, dtype, count, shape, parts)
    residual = None if product.residual is None else product.residual.clone()
    x = product.x if product.norm is None else elementwise.rms_norm(product.x, product.norm)
    tile = FewTile(32 if count > 16 else 16, 64, 128, 4, 3, programs)
    actual = skinny.few_rows(x, product.weight, product.bias, residual, product.gated, tile)
    product.check(actual, residual)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("count", [1, 3, 24, 40])
def test_every_way_that_a_product_can_take(device: str, dtype: torch.dtype, parts: str, count: int) -> None:
    if device == "cpu" and dtype == torch.float16 and count > 32:
        pytest.skip("torch's own product is slow in float16 on CPU")
    product, ops = Product(device, dtype, count, (256, 512), parts), CudaOps()
    residual = None if product.residual is None else product.residual.clone()
    packed = ops.pack(product.weight)
    if product.gated:
        actual = ops.gated_linear(product.x, packed, product.bias, product.norm)
    else:
        actual = ops.linear(product.x, packed, product.bias, product.norm, residual)
    product.check(actual, residual)
