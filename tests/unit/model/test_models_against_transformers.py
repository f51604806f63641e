"""Log-probabilities and greedy tokens equal those of transformers in float32."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from baton.proto.messages import SamplingParams

transformers = pytest.importorskip("transformers")

_TINY = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **values}}


_CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
    "llama-head-size": ("Llama", {"head_dim": 48, "num_key_value_heads": 4}),
    "mistral": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "mistral-window": ("Mistral", {"sliding_window": 24}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2-some-windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "linear": ("Llama", _rope("linear", factor=4.0)),
    "dynamic": ("Llama", _rope("dynamic", factor=2.0)),
    "llama3": (
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "yarn": ("Qwen2", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
}


def _assert_same(model: Any, driver: Any, prompts: list[list[int]], new_tokens: int, chunk: int) -> None:
    params = SamplingParams(max_tokens=new_tokens, temperature=0.0, logprobs=0)
    outputs, logprobs = driver.generate(prompts, params, chunk)
    for prompt, output, rows in zip(prompts, outputs, logprobs, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1)
        best = logits.topk(2).values
        for index, token in enumerate(output):
            close_call = best[index, 0] - best[index, 1] < 1e-3
            assert token == int(logits[index].argmax()) or close_call
            assert abs(rows[index].logprob - float(expected[index, token])) < 1e-3


@pytest.mark.parametrize("case", _CASES)
@pytest.mark.parametrize("shards", [1, 3])
def test_tiny_random_models(case: str, shards: int, tmp_path: Path, make_driver: Callable[..., Any]) -> None:
    name, changes = _CASES[case]
    torch.manual_seed(random.randrange(2**31))
    config = getattr(transformers, f"{name}Config")(**{**_TINY, **changes})
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms start as zeros and ones, which would hide a missing one
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path, max_shard_size=size // shards + 1)
    prompts = [[random.randrange(300) for _ in range(length)] for length in (1, 17, 40, 75)]
    for block_size in (16, 32):
        _assert_same(model, make_driver(tmp_path, block_size=block_size), prompts, new_tokens=12, chunk=20)


@pytest.mark.slow
def test_smollm2(smollm2: Path, make_driver: Callable[..., Any]) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(smollm2)
    texts = ["The capital of France is", "def fibonacci(n):\n", "Once upon a time, " * 40, "1, 2, 3, 4,", "Ünï—码 🙂"]
    prompts = [tokenizer(text).input_ids for text in texts]
    _assert_same(model, make_driver(smollm2), prompts, new_tokens=24, chunk=64)
