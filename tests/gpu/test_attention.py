"""Paged attention computes what the plain torch operations compute, on fresh random input."""

import os
from dataclasses import dataclass

import pytest
import torch

pytest.importorskip("triton")

from baton.kernels.cuda import attention, fa3_attention
from baton.kernels.cuda.fa3_attention import Sequences
from baton.kernels.cuda.ops import AttentionWork, CudaOps
from baton.kernels.reference import TorchOps

pytestmark = pytest.mark.gpu
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (not INTERPRETED)
MIXED = [(0, 1), (1499, 1), (0, 70), (255, 45), (32, 1), (512, 1), (60, 1), (0, 300), (100, 2)]
SMALL = [(0, 1), (599, 1), (0, 35), (40, 20)]
reference = TorchOps()


@dataclass
class Problem:
    """The arguments of Ops.paged_attention; what no sequence holds is NaN."""

    query: torch.Tensor
    pool: torch.Tensor
    query_start: torch.Tensor
    seq_lens: torch.Tensor
    tables: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, int, torch.Tensor, torch.Tensor, torch.Tensor, float]:
        scale = self.query.shape[2] ** -0.5
        return self.query, self.pool, 1, self.query_start, self.seq_lens, self.tables, scale

    def expected(self, window: int = 0, soft_cap: float = 0.0) -> torch.Tensor:
        """In float64, of the same rounded input."""
        query, pool, *rest = self.arguments
        exact = (query.double(), pool.double().nan_to_num(0.0), *rest)
        return reference.paged_attention(*exact, window=window, soft_cap=soft_cap)


def make_problem(
    device: str,
    dtype: torch.dtype,
    heads: int,
    kv_heads: int,
    head_dim: int,
    block_size: int,
    chunks: list[tuple[int, int]],
    window: int = 0,
) -> Problem:
    """chunks: (cached, new) tokens of each sequence, in scattered blocks; whole blocks before a window are NaN too."""
    lengths = [cached + new for cached, new in chunks]
    width = -(-max(lengths) // block_size)
    pool = torch.full((width * len(chunks), kv_heads, 2, 2, block_size, head_dim), torch.nan, dtype=dtype)
    tables = torch.randperm(len(pool)).to(torch.int32).view(len(chunks), width)
    for table, length, (cached, _) in zip(tables, lengths, chunks, strict=True):
        unseen = max(0, cached + 1 - window) // block_size if window else 0
        for index in range(unseen, -(-length // block_size)):
            used = min(block_size, length - index * block_size)
            pool[table[index], :, :, :, :used] = torch.randn(kv_heads, 2, 2, used, head_dim).to(dtype)
    counts = [new for _, new in chunks]
    qkv = torch.randn(sum(counts), heads + 2 * kv_heads, head_dim, dtype=dtype)
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    seq_lens = torch.tensor(lengths, dtype=torch.int32)
    on_device = [tensor.to(device) for tensor in (qkv, pool, starts, seq_lens, tables)]
    return Problem(on_device[0][:, :heads], *on_device[1:])


def assert_near(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """‖actual - expected‖ / ‖expected‖ within what the dtype allows, for every row."""
    bound = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[actual.dtype]
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).norm(dim=1) / expected.double().norm(dim=1)
    assert error.max() < bound


@pytest.fixture(params=["tiles", "hopper"])
def ops(request: pytest.FixtureRequest, device: str) -> CudaOps:
    """Both prefill kernels."""
    if request.param == "tiles":
        return CudaOps()
    if device == "cpu" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    from baton.kernels.cuda import hopper_attention

    return CudaOps(prefill=hopper_attention.prefill)


def skip_what_hopper_leaves(ops: CudaOps, dtype: torch.dtype) -> None:
    if dtype == torch.float32 and ops._prefill is not attention.prefill:
        pytest.skip("a kernel for 16 bits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 64), (8, 2, 128), (6, 2, 80), (5, 1, 256), (8, 1, 256), (7, 1, 128), (4, 2, 96), (2, 2, 192), (32, 1, 64)],
)
@pytest.mark.parametrize("block_size", [16, 48, 64])
def test_paged_attention(
    device: str, ops: CudaOps, dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    """Decode rows short and long enough to be cut, whole prompts, and chunks after cached tokens, in one step."""
    skip_what_hopper_leaves(ops, dtype)
    chunks = SMALL if device == "cpu" else MIXED
    problem = make_problem(device, dtype, heads, kv_heads, head_dim, block_size, chunks)
    assert_near(ops.paged_attention(*problem.arguments), problem.expected())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 1, 40, 333])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_window_and_soft_cap(
    device: str, ops: CudaOps, dtype: torch.dtype, window: int, soft_cap: float, head_dim: int
) -> None:
    skip_what_hopper_leaves(ops, dtype)
    chunks = SMALL if device == "cpu" else MIXED
    problem = make_problem(device, dtype, 8, 2, head_dim, 16, chunks, window)
    actual = ops.paged_attention(*problem.arguments, window=window, soft_cap=soft_cap)
    assert_near(actual, problem.expected(window, soft_cap))


def test_tiles_that_do_not_count_are_not_computed(device: str, ops: CudaOps) -> None:
    """The lists of a graph are longer than what a step fills of them."""
    dtype = torch.float16
    problem = make_problem(device, dtype, 4, 2, 64, 16, SMALL)
    query, pool, _, starts, seq_lens, tables, _ = problem.arguments
    planned = ops.plan(query, pool, starts, seq_lens, tables)
    lists = planned.lists[0]
    assert lists.prefill is not None
    assert lists.decode is not None
    garbage = torch.full((5, 8), 2**30, dtype=torch.int32, device=device)
    lists.prefill, lists.decode = torch.cat([lists.prefill, garbage]), torch.cat([lists.decode, garbage])
    assert_near(ops.paged_attention(*problem.arguments, planned=planned), problem.expected())


def test_blocks_beyond_two_gigabytes(device: str, ops: CudaOps) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU's memory")
    pool = torch.empty(300_000, 1, 1, 2, 64, 128, device=device, dtype=torch.bfloat16)
    tables = torch.tensor([[299_998, 299_999]] * 2, dtype=torch.int32, device=device)
    pool[299_998:] = torch.randn(2, 1, 1, 2, 64, 128, device=device)
    query = torch.randn(41, 4, 128, device=device, dtype=torch.bfloat16)
    starts, seq_lens = (torch.tensor(v, dtype=torch.int32, device=device) for v in ([0, 1, 41], [100, 120]))
    arguments = (query, pool, 0, starts, seq_lens, tables, 0.1)
    assert_near(ops.paged_attention(*arguments), reference.paged_attention(*arguments))


def test_a_chunk_after_120_000_tokens(device: str, ops: CudaOps) -> None:
    if device == "cpu":
        pytest.skip("needs a GPU's speed")
    problem = make_problem(device, torch.bfloat16, 4, 1, 128, 16, [(120_000, 130), (127_999, 1)])
    assert_near(ops.paged_attention(*problem.arguments), problem.expected())


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("window", [0, 40])
def test_flash_attention_3(device: str, head_dim: int, window: int) -> None:
    if device == "cpu" or not fa3_attention.installed():
        pytest.skip("needs a GPU and the extra 'fa3'")
    problem = make_problem(device, torch.bfloat16, 8, 2, head_dim, 16, MIXED, window)
    query, pool, layer, starts, seq_lens, tables, scale = problem.arguments
    pool.nan_to_num_(0.0)  # it multiplies what lies behind a sequence by 0
    planned = AttentionWork(tables, {}, Sequences(starts, seq_lens, tables, max_query_len=300))
    actual = CudaOps().paged_attention(query, pool, layer, starts, seq_lens, tables, scale, planned, window)
    assert_near(actual, problem.expected(window))
