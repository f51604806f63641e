"""--batch-invariant: a row's results have the same bits whatever else is computed beside it."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from support.engine import generate, make_engine, random_prompts

from baton.kernels.cuda import invariant
from baton.kernels.cuda.invariant import InvariantOps
from baton.kernels.ops import Norm
from baton.proto.messages import SamplingParams

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("gpu")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "size"), [(6144, 4096), (1000, 576), (96, 1536), (3000, 200)])
@pytest.mark.parametrize("more", [False, True], ids=["alone", "with norm, bias and residual"])
def test_products_do_not_depend_on_the_number_of_rows(dtype: torch.dtype, features: int, size: int, more: bool) -> None:
    ops = InvariantOps()
    x, residual = (torch.randn(1500, n, device="cuda", dtype=dtype) for n in (size, features))
    weight = ops.pack(torch.randn(features, size, device="cuda", dtype=dtype))
    bias, gain = (torch.randn(n, device="cuda", dtype=dtype) for n in (features, size))

    def product(start: int, rows: int) -> torch.Tensor:
        part = x[start : start + rows]
        if not more:
            return ops.linear(part, weight, None)
        return ops.linear(part, weight, bias, Norm(gain, 1e-5), residual[start : start + rows].clone())

    whole = product(0, 1500)
    exact = (ops.rms_norm(x, Norm(gain, 1e-5)) if more else x).double() @ weight.data.double().T
    exact += bias.double() + residual.double() if more else 0
    assert (whole - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 4e-3)
    for rows in (1, 2, 16, 17, 63, 64, 65, 200, 257, 600, 1100):
        start = random.randrange(1500 - rows)
        assert torch.equal(product(start, rows), whole[start : start + rows])


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_every_tile_sums_in_the_same_order(dtype: torch.dtype) -> None:
    x, weight = (torch.randn(n, 2048, device="cuda", dtype=dtype) for n in (300, 1500))
    first, *others = [invariant.product(x, weight, None, None, tile) for *_, tile in invariant.TILES]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_have_the_same_bits_in_every_batch_and_every_chunk(checkpoint: Path, dtype: str) -> None:
    """Log-probabilities of the best tokens, alone, among few and many, in whole prompts and in pieces of any size."""
    prompts = random_prompts(150, (1, 2, 33, 200, 700))
    params = [SamplingParams(max_tokens=20, temperature=0.0, logprobs=5)] * len(prompts)

    def streams(count: int, **options: Any) -> list[Any]:
        engine = make_engine(checkpoint, dtype, batch_invariant=True, max_num_seqs=160, num_blocks=9000, **options)
        made = generate(engine, prompts[:count], params[:count])
        engine.close()
        return list(zip(*made, strict=True))

    everyone = streams(150)
    assert streams(7) == everyone[:7]
    assert streams(40, max_num_batched_tokens=177) == everyone[:40]
    assert streams(150, max_num_batched_tokens=1000, caching=True) == everyone
    alone = make_engine(checkpoint, dtype, batch_invariant=True)
    for index in range(3):
        made = generate(alone, [prompts[index]], [params[index]])
        assert list(zip(*made, strict=True)) == [everyone[index]]
    alone.close()
