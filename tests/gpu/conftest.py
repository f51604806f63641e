"""Tests of the GPU path. The kernels' own tests also run without a GPU, slowly: TRITON_INTERPRET=1 pytest tests/gpu."""

import os

import pytest
import torch

pytest.importorskip("triton")


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"
