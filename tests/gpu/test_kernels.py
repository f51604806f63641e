"""The Triton kernels compute what the plain torch operations compute, on fresh random input."""

import os

import pytest
import torch

pytest.importorskip("triton")

from baton.kernels.cuda.ops import CudaOps
from baton.kernels.ops import Norm
from baton.kernels.reference import TorchOps

pytestmark = pytest.mark.gpu
# Triton's interpreter gets bfloat16 arithmetic wrong.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
ops, reference = CudaOps(), TorchOps()


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """‖actual - expected‖ / ‖expected‖ within what the dtype allows."""
    bound = 1e-5 if actual.dtype == torch.float32 else 1e-2
    assert torch.isfinite(actual.float()).all()
    error = (actual.double() - expected.double()).norm() / expected.double().norm()
    assert error < bound


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 576), (3, 50), (33, 4096)])
def test_norm(device: str, dtype: torch.dtype, rows: int, size: int) -> None:
    x = torch.randn(rows, size, device=device, dtype=dtype)
    norm = Norm(torch.randn(size, device=device, dtype=dtype), 1e-5)
    assert_near(ops.rms_norm(x, norm), reference.rms_norm(x, norm))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1536), (4, 50), (20, 5000)])
def test_silu_and_mul(device: str, dtype: torch.dtype, rows: int, size: int) -> None:
    gate_up = torch.randn(rows, 2 * size, device=device, dtype=dtype) * 5
    assert_near(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 1.0), (80, 0.5), (128, 1.0)])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache(device: str, dtype: torch.dtype, head_dim: int, rotary: float, normed: bool) -> None:
    tokens, heads, kv_heads, layers, block_size = 40, 6, 2, 3, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim, device=device, dtype=dtype)
    cos_sin = torch.randn(500, int(head_dim * rotary), device=device)
    positions = torch.randint(0, 500, (tokens,), dtype=torch.int32, device=device)
    slots = torch.randperm(9 * block_size, device=device)[:tokens]
    weights = torch.randn(2, head_dim, device=device, dtype=dtype)
    norm = (weights[0], weights[1], 1e-6) if normed else None
    pool = torch.zeros(9, kv_heads, layers, 2, block_size, head_dim, device=device, dtype=dtype)
    expected_pool = pool.clone()
    expected = reference.rope_and_cache(qkv, heads, cos_sin, positions, slots, expected_pool, 1, norm)
    actual = ops.rope_and_cache(qkv.clone(), heads, cos_sin, positions, slots, pool, 1, norm)
    assert_near(actual, expected)
    assert_near(pool, expected_pool)
    assert not pool[:, :, [0, 2]].any()


def test_a_padded_token_is_written_nowhere(device: str) -> None:
    qkv, pool = torch.randn(2, 3 * 64, device=device), torch.zeros(2, 1, 1, 2, 16, 64, device=device)
    slots = torch.full((2,), -1, device=device)
    zeros = torch.zeros(2, dtype=torch.int32, device=device)
    ops.rope_and_cache(qkv, 1, torch.randn(4, 64, device=device), zeros, slots, pool, 0, None)
    assert not pool.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_with_temperature_0_get_the_first_of_the_largest(device: str, dtype: torch.dtype) -> None:
    logits = torch.randint(-50, 50, (7, 30011), device=device).to(dtype)
    zero = torch.zeros(7, device=device)
    off = (zero.long(), zero.double() + 1, zero, zero.double())
    assert torch.equal(ops.draw(logits, zero, *off).cpu(), logits.float().cpu().argmax(-1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [3, 4096, 30011])
def test_logsumexp(device: str, dtype: torch.dtype, size: int) -> None:
    logits = torch.randn(9, size, device=device).to(dtype) * 20
    logits[4, : size // 2] = -torch.inf
    actual = ops.logsumexp(logits)
    assert (actual - logits.float().logsumexp(-1)).abs().max() < 1e-4
    assert torch.equal(actual[5:6], ops.logsumexp(logits[5:6]))


@pytest.mark.parametrize("top_k", [0, 1, 7])
@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("min_p", [0.0, 0.1])
def test_draw(device: str, top_k: int, top_p: float, min_p: float) -> None:
    rows, vocab = 24, 9000
    logits = torch.randn(rows, vocab, device=device) * 3
    arguments = (
        torch.rand(rows, device=device) + 0.3,
        torch.full((rows,), top_k, device=device),
        torch.full((rows,), top_p, device=device, dtype=torch.float64),
        torch.full((rows,), min_p, device=device),
        torch.rand(rows, device=device, dtype=torch.float64),
    )
    drawn, expected = ops.draw(logits, *arguments), reference.draw(logits, *arguments)
    # A cumulative sum within rounding of the uniform may fall on either side.
    assert (drawn != expected).sum() <= 1
