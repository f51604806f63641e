"""A GGUF file as a Hugging Face directory: config.json, model.safetensors, tokenizer and generation files.

Weights are de-quantised tensor by tensor and streamed to disk, so that memory stays at one tensor. Neither torch nor
transformers is imported: a start that only looks the result up should cost nothing.

Source: the GGUF specification (ggml/docs/gguf.md) and llama.cpp's convert_hf_to_gguf.py, which is undone here.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CONVERTER_VERSION = 1
"""Part of the cache key: raise it when the output for the same input changes."""

ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""Our dtype names -> safetensors'."""

_GLOBAL_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FREQS = "rope_freqs.weight"


class GgufError(ValueError):
    """The file can't be converted; the message says why."""


def digest(path: Path, dtype: str) -> str:
    """Cheap content key of a file: its size and 64 samples of 64 KiB spread over it, the dtype and our version."""
    size = path.stat().st_size
    state = hashlib.blake2b(f"{CONVERTER_VERSION} {dtype} {size}".encode(), digest_size=8)
    with path.open("rb") as file:
        for index in range(64):
            file.seek(max(0, size - 2**16) * index // 63)
            state.update(file.read(2**16))
    return state.hexdigest()


def convert(path: Path, directory: Path, dtype: str, progress: Callable[[str], None]) -> None:
    """Write the files for `path` into the existing, empty `directory`. Raises GgufError when it is not possible."""
    from gguf import GGUFReader

    try:
        reader = GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        raise GgufError(f"{path} is not a readable GGUF file: {error}") from error
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    config = _config(metadata, tensors, dtype)
    _write_json(directory / "config.json", config)
    _write_json(directory / "generation_config.json", _generation_config(metadata))
    _write_tokenizer(directory, metadata, config["max_position_embeddings"])
    _write_safetensors(directory / "model.safetensors", tensors, config, dtype, progress)


def _config(metadata: dict[str, Any], tensors: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Content of config.json. Raises GgufError for an architecture that has no model here."""
    arch = metadata["general.architecture"]
    if arch not in ARCHITECTURES:
        raise GgufError(f"GGUF architecture '{arch}' is not supported; supported: {', '.join(ARCHITECTURES)}")
    hidden = metadata[f"{arch}.embedding_length"]
    heads = metadata[f"{arch}.attention.head_count"]
    head_dim = metadata.get(f"{arch}.attention.key_length") or hidden // heads
    special = {k: metadata.get(f"tokenizer.ggml.{n}_token_id") for k, n in _SPECIAL_IDS.items()}
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata[f"{arch}.feed_forward_length"],
        "num_hidden_layers": metadata[f"{arch}.block_count"],
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(metadata[f"{arch}.attention.layer_norm_rms_epsilon"]),
        "rope_theta": _shortest(metadata.get(f"{arch}.rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(metadata, tensors, arch, head_dim),
        "max_position_embeddings": metadata[f"{arch}.context_length"],
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "torch_dtype": dtype,
        **{key: value for key, value in special.items() if value is not None},
    }


_SPECIAL_IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}


def _rope_scaling(metadata: dict[str, Any], tensors: dict[str, Any], arch: str, head_dim: int) -> dict | None:
    if _ROPE_FREQS in tensors:
        return _llama3_scaling(np.asarray(tensors[_ROPE_FREQS].data), metadata, arch, head_dim)
    kind = metadata.get(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    original = metadata.get(f"{arch}.rope.scaling.original_context_length")
    scaling = {"rope_type": kind, "factor": _shortest(metadata[f"{arch}.rope.scaling.factor"])}
    return scaling | ({"original_max_position_embeddings": original} if original else {})


def _llama3_scaling(factors: np.ndarray, metadata: dict[str, Any], arch: str, head_dim: int) -> dict:
    """llama.cpp stores what Llama 3.1's scaling does to each frequency; its parameters are found by comparing."""
    theta = metadata.get(f"{arch}.rope.freq_base", 10000.0)
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    factor, low, high, original = float(factors.max()), 1.0, 4.0, 8192
    smooth = (original / wavelengths - low) / (high - low)
    expected = 1 / np.clip(smooth + (1 - smooth) / factor, 1 / factor, 1)
    if not np.allclose(factors, expected, rtol=1e-3):
        raise GgufError("rope_freqs.weight does not follow Llama 3.1's rule; this rope scaling is not supported")
    return {
        "rope_type": "llama3",
        "factor": _shortest(factor),
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


def _shortest(value: float) -> float:
    """The decimal that was meant: metadata is float32, JSON would show 9.999999747378752e-06 for 1e-05."""
    return float(str(np.float32(value)))


def _generation_config(metadata: dict[str, Any]) -> dict[str, Any]:
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot")]
    unique = list(dict.fromkeys(end for end in ends if end is not None))
    config: dict[str, Any] = {"eos_token_id": unique[0] if len(unique) == 1 else unique}
    for key in ("bos_token_id", "pad_token_id"):
        value = metadata.get(f"tokenizer.ggml.{_SPECIAL_IDS[key]}_token_id")
        if value is not None:
            config[key] = value
    return config


def _write_tokenizer(directory: Path, metadata: dict[str, Any], max_length: int) -> None:
    from baton.worker.weights.gguf_tokenizer import build_tokenizer, tokenizer_config

    (directory / "tokenizer.json").write_text(build_tokenizer(metadata).to_str(pretty=True), encoding="utf-8")
    _write_json(directory / "tokenizer_config.json", tokenizer_config(metadata, max_length))


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_safetensors(
    path: Path, tensors: dict[str, Any], config: dict[str, Any], dtype: str, progress: Callable[[str], None]
) -> None:
    """The header first (every shape is known), then one tensor after the other, in file order."""
    names = {name: _hf_name(name) for name in tensors if name != _ROPE_FREQS}
    width = 4 if dtype == "float32" else 2
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, hf_name in names.items():
        shape = [int(extent) for extent in reversed(tensors[name].shape)]
        size = int(np.prod(shape)) * width
        header[hf_name] = {"dtype": DTYPES[dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for index, array in enumerate(_arrays(tensors, names, config), start=1):
            file.write(_cast(array, dtype).data)
            if index % 32 == 0 or index == len(names):
                progress(f"de-quantised {index}/{len(names)} tensors")


def _arrays(tensors: dict[str, Any], names: dict[str, str], config: dict[str, Any]) -> Iterator[np.ndarray]:
    """De-quantised float32 arrays in the row order of the Hugging Face checkpoint."""
    from gguf.quants import dequantize

    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, hf_name in names.items():
        array = dequantize(tensors[name].data, tensors[name].tensor_type).astype(np.float32, copy=False)
        projection = hf_name.split(".")[-2]
        if config["model_type"] == "llama" and projection in heads:
            array = _unpermute(array, heads[projection])
        yield np.ascontiguousarray(array)


def _unpermute(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """llama.cpp rotates neighbouring pairs, Hugging Face halves; the converter reordered each head's rows for that."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "float32":
        return array
    if dtype == "float16":
        return array.astype(np.float16)
    bits = array.view(np.uint32)  # numpy has no bfloat16: round to nearest even by hand
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _hf_name(name: str) -> str:
    if name in _GLOBAL_NAMES:
        return _GLOBAL_NAMES[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER_NAMES:
        return f"model.layers.{parts[1]}.{_LAYER_NAMES[parts[2]]}.{parts[3]}"
    raise GgufError(f"GGUF tensor '{name}' has no place in the supported models")
