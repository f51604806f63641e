"""GGUF conversion, its tokenizer, and the loader's errors."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from baton.kernels.reference import TorchOps
from baton.worker.models.registry import find_model
from baton.worker.weights import loader, placement
from baton.worker.weights.gguf import DTYPES, _cast, _unpermute
from baton.worker.weights.resolve import ResolveError, resolve

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

TEXTS = [
    "Hello, world! It's 9:41 on 2026-11-23; they're 42 years old.",
    "def f(x: int) -> int:\n    if x<=1:\n\treturn x\n    return f(x-1)*x  # naïve\n",
    "日本語のテキスト、中文字符 и кириллица, ελληνικά, עברית, العربية, हिन्दी",
    "🙂👩‍👩‍👧‍👦 e\u0301 \u200b \u00a0 a² 5½ 12345678901234567890",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<|endoftext|>",
    "   leading and trailing   \n\n\n\t\t tabs \r\n crlf",
    'SELECT * FROM t WHERE a = 3.14159 AND b != "x"; -- {"k": [1, 2, {"z": null}]}',
    "",
]


def _model(config: dict[str, Any] = CONFIG) -> Any:
    model_class, config_class = find_model(config)
    model = model_class(config_class.from_json(config), 64, TorchOps(), torch.float32)
    placement.place(model, torch.device("cpu"))
    return model


def _checkpoint(model: Any) -> dict[str, torch.Tensor]:
    return {name: torch.randn(target.shape) for name, target in loader._targets(model).items()}


@pytest.mark.slow
def test_gguf_weights_equal_those_of_transformers(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from baton.worker.weights.resolve import _demo_gguf

    file = _demo_gguf(print)
    config = transformers.GgufConfig(dequantize=True)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, quantization_config=config, dtype=torch.float32
    ).state_dict()
    for name, tensor in load_file(smollm2 / "model.safetensors").items():
        assert torch.equal(tensor, reference[name]), name


@pytest.mark.slow
def test_gguf_tokenizer_equals_that_of_transformers(smollm2: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from baton.worker.weights.resolve import _demo_gguf

    file = _demo_gguf(print)
    reference = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    ours = transformers.AutoTokenizer.from_pretrained(smollm2)
    for text in TEXTS:
        ids = ours(text).input_ids
        assert ids == reference(text).input_ids, text
        assert ours.decode(ids) == reference.decode(ids)
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages, tokenize=False) == reference.apply_chat_template(messages, tokenize=False)
    assert (ours.bos_token_id, ours.eos_token_id) == (reference.bos_token_id, reference.eos_token_id)


def test_smollm_splits_digits_before_the_spaces_in_front_of_them(smollm2: Path) -> None:
    """tokenizer.ggml.pre is 'smollm': digits are cut out first, so the spaces stay one token. Transformers' conversion
    ignores that key and gives the last space to the digit; llama.cpp and the model's own tokenizer.json do as here."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(smollm2 / "tokenizer.json"))
    assert tokenizer.encode("x =    17").tokens == ["x", "Ġ=", "ĠĠĠĠ", "1", "7"]


def test_converted_directory_is_complete(smollm2: Path) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    assert config["rms_norm_eps"] == 1e-5
    assert config["tie_word_embeddings"] is True
    assert json.loads((smollm2 / "generation_config.json").read_text())["eos_token_id"] == 2
    assert "<|im_start|>" in json.loads((smollm2 / "tokenizer_config.json").read_text())["chat_template"]


def test_unpermute_undoes_llama_cpp() -> None:
    rows = np.arange(2 * 8 * 3).reshape(16, 3)
    permuted = rows.reshape(2, 2, 4, 3).swapaxes(1, 2).reshape(16, 3)  # LlamaModel.permute of convert_hf_to_gguf.py
    assert np.array_equal(_unpermute(permuted, 2), rows)


def test_cast_to_bfloat16_rounds_to_nearest_even() -> None:
    values = torch.cat([torch.randn(1000), torch.tensor([1.00390625, 1.01171875, 0.0, -0.0])])
    bits = _cast(values.numpy(), "bfloat16").view(np.int16)
    assert torch.equal(torch.from_numpy(bits).view(torch.bfloat16), values.to(torch.bfloat16))
    assert set(DTYPES) == {"float32", "float16", "bfloat16"}


def test_loader_fills_merged_weights_in_order(tmp_path: Path) -> None:
    model = _model()
    tensors = _checkpoint(model)
    save_file(tensors, tmp_path / "model.safetensors")
    loader.load_checkpoint(model, tmp_path)
    parts = [tensors[f"model.layers.1.self_attn.{name}_proj.weight"] for name in "qkv"]
    assert torch.equal(model.model.layers[1].self_attn.qkv_proj.weight, torch.cat(parts))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"lacks model\.norm\.weight \[16\]"),
        (lambda t: t.update(extra=torch.zeros(3)), r"extra \[3\] has no place"),
        (
            lambda t: t.update({"model.layers.0.self_attn.k_proj.weight": torch.zeros(4, 16)}),
            r"k_proj\.weight is \[4, 16\], expected \[8, 16\]",
        ),
    ],
)
def test_loader_names_the_tensor_that_is_wrong(
    change: Callable[[dict[str, torch.Tensor]], Any], message: str, tmp_path: Path
) -> None:
    model = _model()
    tensors = _checkpoint(model)
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(loader.LoadError, match=message):
        loader.load_checkpoint(model, tmp_path)


def test_broken_checkpoints_are_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(loader.LoadError, match=r"lacks any \*\.safetensors file"):
        loader.weight_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(loader.LoadError, match="not a readable safetensors file"):
        loader.load_checkpoint(_model(), tmp_path)


def test_dummy_weights_follow_the_seed() -> None:
    first, same, other = _model(), _model(), _model()
    for model, seed in ((first, 1), (same, 1), (other, 2)):
        loader.fill_dummy(model, seed)
    weights = [model.model.layers[0].mlp.down_proj.weight for model in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert float(weights[0].abs().max()) <= 1e-3


def test_fingerprint_tells_weights_dtypes_and_seeds_apart(tmp_path: Path) -> None:
    def of(load_format: str = "auto", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> str:
        return loader.fingerprint(CONFIG | changes, tmp_path, dtype, load_format, seed)

    tensors = _checkpoint(_model())
    save_file(tensors, tmp_path / "model.safetensors")
    first = of()
    assert first == of(transformers_version="5", use_cache=False)
    different = {first, of(dtype=torch.bfloat16), of("dummy"), of("dummy", 1), of(rope_theta=5.0)}
    tensors["model.norm.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    assert len(different | {of()}) == 6


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("./missing", "model not found"),
        ("/nowhere/model.gguf", "model not found"),
        ("a/b/c", "model not found"),
        ("{tmp}", "no config.json"),
        ("{tmp}/weights.bin", "neither a directory nor a .gguf file"),
        ("{tmp}/broken.gguf", "not a readable GGUF file"),
    ],
)
def test_resolve_errors(model: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "weights.bin").write_bytes(b"x")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    with pytest.raises(ResolveError, match=message):
        resolve(model.replace("{tmp}", str(tmp_path)))


def test_resolve_as_a_program(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    command = [sys.executable, "-m", "baton.worker.weights.resolve"]
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, env=env)
    assert json.loads(done.stdout) == {"path": str(tmp_path)}
    failed = subprocess.run([*command, str(tmp_path / "no")], capture_output=True, text=True, env=env)
    assert failed.returncode == 2
    assert failed.stdout == ""
    assert failed.stderr.count("\n") == 1
