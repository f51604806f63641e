"""The C kernels compute what the plain torch operations compute, on fresh random input."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from baton.kernels.cpu.build import BuildError, build
from baton.kernels.cpu.ops import CpuOps
from baton.kernels.ops import Norm
from baton.kernels.reference import TorchOps
from baton.worker.attention import choose_ops
from baton.worker.attention.model import Model

reference = TorchOps()


@pytest.fixture(scope="module")
def ops() -> CpuOps:
    try:
        return CpuOps(build(), torch.get_num_threads())
    except BuildError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("rows", [1, 2, 5, 12, 13, 31, 64])
@pytest.mark.parametrize(("features", "outputs"), [(576, 960), (37, 50), (128, 1)])
@pytest.mark.parametrize("around", ["nothing", "bias", "norm and residual"])
def test_linear(ops: CpuOps, rows: int, features: int, outputs: int, around: str) -> None:
    x, weight = torch.randn(rows, features), torch.randn(outputs, features)
    bias = torch.randn(outputs) if around == "bias" else None
    norm, residual = None, None
    if around == "norm and residual":
        norm, residual = Norm(torch.randn(features), 1e-5), torch.randn(rows, outputs)
    expected = reference.linear(x, reference.pack(weight), bias, norm, residual)
    actual = ops.linear(x, ops.pack(weight), bias, norm, residual)
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(("rows", "features", "outputs"), [(1, 576, 3072), (20, 37, 50)])
def test_gated_linear(ops: CpuOps, rows: int, features: int, outputs: int) -> None:
    x, weight = torch.randn(rows, features), torch.randn(outputs, features) / features
    bias, norm = torch.randn(outputs), Norm(torch.randn(features), 1e-5)
    expected = reference.gated_linear(x, reference.pack(weight), bias, norm)
    torch.testing.assert_close(ops.gated_linear(x, ops.pack(weight), bias, norm), expected, atol=1e-4, rtol=1e-4)


def test_a_row_of_a_product_has_the_same_bits_in_every_batch(ops: CpuOps) -> None:
    x, packed = torch.randn(40, 96), ops.pack(torch.randn(70, 96))
    whole = ops.linear(x, packed, None)
    for start, end in [(0, 1), (3, 20), (39, 40)]:
        assert torch.equal(ops.linear(x[start:end], packed, None), whole[start:end])


def test_embedding_reads_packed_rows(ops: CpuOps) -> None:
    weight, ids = torch.randn(100, 24), torch.tensor([0, 99, 31, 32, 32])
    assert torch.equal(ops.embedding(ids, ops.pack(weight)), weight[ids])


@pytest.mark.parametrize(("rows", "size"), [(1, 576), (3, 50), (300, 512)])
def test_norm(ops: CpuOps, rows: int, size: int) -> None:
    x, norm = torch.randn(rows, size), Norm(torch.randn(size), 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, norm), reference.rms_norm(x, norm))


@pytest.mark.parametrize(("rows", "size"), [(1, 1536), (4, 50), (200, 512)])
def test_silu_and_mul(ops: CpuOps, rows: int, size: int) -> None:
    gate_up = torch.randn(rows, 2 * size) * 20
    gate_up[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -87.5])
    torch.testing.assert_close(ops.silu_and_mul(gate_up), reference.silu_and_mul(gate_up), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("rotary", [1.0, 0.5])
@pytest.mark.parametrize("normed", [False, True])
def test_rope_and_cache(ops: CpuOps, head_dim: int, rotary: float, normed: bool) -> None:
    tokens, heads, kv_heads, layers, block_size = 70, 6, 2, 3, 16
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * head_dim)
    cos_sin = torch.randn(500, int(head_dim * rotary))
    positions = torch.randint(0, 500, (tokens,), dtype=torch.int32)
    slots = torch.randperm(9 * block_size)[:tokens]
    norm = (torch.randn(head_dim), torch.randn(head_dim), 1e-6) if normed else None
    pool = torch.zeros(9, kv_heads, layers, 2, block_size, head_dim)
    expected_pool = pool.clone()
    expected = reference.rope_and_cache(qkv, heads, cos_sin, positions, slots, expected_pool, 1, norm)
    actual = ops.rope_and_cache(qkv.clone(), heads, cos_sin, positions, slots, pool, 1, norm)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(pool, expected_pool, atol=1e-5, rtol=1e-5)


def _problem(heads: int, kv_heads: int, head_dim: int, block_size: int, chunks: list[tuple[int, int]]) -> dict:
    """chunks: (tokens cached before, new tokens) per sequence; blocks are scattered over a pool full of NaN."""
    lengths = [cached + new for cached, new in chunks]
    width = max(-(-length // block_size) for length in lengths)
    num_blocks = len(chunks) * width
    pool = torch.full((num_blocks, kv_heads, 2, 2, block_size, head_dim), float("nan"))
    tables = torch.randperm(num_blocks).reshape(len(chunks), width).to(torch.int32)
    for table, length in zip(tables, lengths, strict=True):
        for index in range(-(-length // block_size)):
            used = min(block_size, length - index * block_size)
            pool[table[index], :, :, :, :used] = torch.randn(kv_heads, 2, 2, used, head_dim)
    starts = torch.tensor([0, *[new for _, new in chunks]]).cumsum(0).to(torch.int32)
    return {
        "query": torch.randn(int(starts[-1]), heads + 1, head_dim)[:, :heads],  # rows are not dense
        "pool": pool,
        "layer": 1,
        "query_start": starts,
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "block_tables": tables,
        "scale": head_dim**-0.5,
    }


@pytest.mark.parametrize("block_size", [16, 48, 64])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(9, 3, 64), (4, 4, 80), (8, 1, 128), (2, 1, 256), (60, 1, 64)]
)
def test_paged_attention_on_mixed_batches(
    ops: CpuOps, heads: int, kv_heads: int, head_dim: int, block_size: int
) -> None:
    chunks = [(0, 1), (0, 70), (63, 1), (64, 1), (700, 1), (300, 33), (random.randrange(1500), random.randrange(1, 90))]
    problem = _problem(heads, kv_heads, head_dim, block_size, chunks)
    reference_pool = problem | {"pool": problem["pool"].nan_to_num(0.0)}
    expected = reference.paged_attention(**reference_pool)
    torch.testing.assert_close(ops.paged_attention(**problem), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [1, 40, 600, 5000])
@pytest.mark.parametrize("soft_cap", [0.0, 3.0])
def test_paged_attention_with_a_window_and_a_soft_cap(ops: CpuOps, window: int, soft_cap: float) -> None:
    problem = _problem(9, 3, 64, 16, [(0, 1), (0, 70), (64, 1), (2000, 1), (1300, 33)])
    for table, length in zip(problem["block_tables"], problem["seq_lens"].tolist(), strict=True):
        unseen = max(0, length - 70 - window) // 512 * 32  # whole partitions before the window of the longest chunk
        table[:unseen] = -(2**20)
    options = {"window": window, "soft_cap": soft_cap}
    safe = {"pool": problem["pool"].nan_to_num(0.0), "block_tables": problem["block_tables"].clamp(min=0)}
    expected = reference.paged_attention(**problem | safe, **options)
    torch.testing.assert_close(ops.paged_attention(**problem, **options), expected, atol=2e-5, rtol=1e-4)


def test_attention_of_a_token_has_the_same_bits_alone_and_in_a_chunk(ops: CpuOps) -> None:
    problem = _problem(9, 3, 64, 16, [(900, 200)])
    whole = ops.paged_attention(**problem)
    for row in (0, 77, 123, 124, 199):
        alone = problem | {
            "query": problem["query"][row : row + 1],
            "query_start": torch.tensor([0, 1], dtype=torch.int32),
            "seq_lens": torch.tensor([900 + row + 1], dtype=torch.int32),
        }
        assert torch.equal(ops.paged_attention(**alone)[0], whole[row])


def test_one_openmp_runtime_is_loaded(ops: CpuOps) -> None:
    with open("/proc/self/maps") as maps:
        runtimes = {line.split()[-1] for line in maps if "libgomp" in line or "libiomp" in line}
    assert len(runtimes) == 1


@pytest.mark.parametrize("size", [50, 49152])
def test_draw(ops: CpuOps, size: int) -> None:
    rows = 60
    logits = torch.randn(rows, size) * 4
    logits[0, : size // 2] = -torch.inf
    logits[1] = logits[1].round()  # ties
    arguments = (
        torch.rand(rows) + 0.3,
        torch.randint(0, 40, (rows,)) * (torch.rand(rows) < 0.5),
        torch.where(torch.rand(rows) < 0.5, torch.rand(rows, dtype=torch.float64), 1.0),
        torch.rand(rows) * 0.1 * (torch.rand(rows) < 0.5),
        torch.rand(rows, dtype=torch.float64),
    )
    different = ops.draw(logits, *arguments) != reference.draw(logits, *arguments)
    assert int(different.sum()) <= 1  # a uniform may fall on the edge between two tokens, within rounding


@pytest.mark.parametrize("size", [1, 50, 4096, 49152])
def test_logsumexp(ops: CpuOps, size: int) -> None:
    logits = torch.randn(9, size) * 10
    logits[0, : size // 2] = -torch.inf
    logits[1] = 200.0  # beyond the range of e^x in float32
    torch.testing.assert_close(ops.logsumexp(logits), logits.double().logsumexp(dim=-1).float(), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("device_ops", ["C", "torch"])
def test_the_logsumexp_of_a_row_has_the_same_bits_in_every_batch(ops: CpuOps, device_ops: str) -> None:
    chosen = ops if device_ops == "C" else reference
    logits = torch.randn(24, 49152) * 4
    whole = chosen.logsumexp(logits)
    for start, end in [(0, 1), (3, 11), (23, 24)]:
        assert torch.equal(chosen.logsumexp(logits[start:end]), whole[start:end])


def test_without_a_compiler_torch_serves_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "")
    assert isinstance(choose_ops("cpu", Model(torch.float32, 64)), TorchOps)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no C compiler found" in caplog.text


@pytest.mark.slow
def test_two_processes_may_compile_at_once(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", "import torch; from baton.kernels.cpu.build import build; print(build())"]
    starts = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {start.communicate()[0] for start in starts}
    assert [start.returncode for start in starts] == [0, 0]
    assert len(paths) == 1
    assert sorted(path.suffix for path in (tmp_path / "baton" / "kernels").iterdir()) == [".lock", ".so"]


def test_threads_that_waited_for_a_thread_end_when_it_gives_them_back() -> None:
    program = """if True:
        import time
        import psutil, torch
        from baton.kernels.cpu.openmp import give_back_threads
        torch.set_num_threads(3)
        count = psutil.Process().num_threads
        idle = count()
        torch.zeros(2**20).add_(1)
        busy = count()
        give_back_threads()
        deadline = time.monotonic() + 10  # the kernel may count a thread that has been joined for a moment more
        while count() > idle and time.monotonic() < deadline:
            time.sleep(0.01)
        print(busy - idle, count() - idle)
    """
    environment = os.environ | {"OMP_NUM_THREADS": "3", "PYTHONSAFEPATH": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "0"]
