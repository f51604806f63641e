"""The kernel that moves KV blocks, against its reference on fresh random input."""

import pytest
import torch

pytest.importorskip("triton")

from baton.kernels import reference
from baton.kernels.cuda.copy import copy_blocks

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("words", [16, 8 * 1024, 16 * 45, 3 * 32 * 1024])
@pytest.mark.parametrize("count", [0, 1, 7, 150])
def test_blocks_arrive_and_no_other_is_touched(device: str, words: int, count: int) -> None:
    source = torch.randint(-(2**31), 2**31 - 1, (200, words), dtype=torch.int32, device=device)
    target = torch.randint_like(source, 2**31 - 1)
    expected = target.clone()
    jobs = torch.stack([torch.randperm(200, device=device)[:count] for _ in range(2)], dim=1)
    reference.copy_blocks(source, expected, jobs)
    starts = torch.tensor([source.data_ptr(), target.data_ptr()], device=device)
    copy_blocks(starts + jobs * (words * 4), words * 4)
    assert torch.equal(target, expected)
