"""Checkpoint tensors into a model's parameters, one at a time, and the fingerprint of what was loaded."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from baton.proto.errors import UserError
from baton.worker.layers.linear import Linear

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

_IGNORED_SUFFIXES = ("rotary_emb.inv_freq", "attention.masked_bias")
"""Buffers that old checkpoints saved and that are computed here."""
_FINGERPRINT_IGNORES = ("_name_or_path", "transformers_version", "use_cache", "torch_dtype", "dtype", "bos_token_id")


class LoadError(UserError, ValueError):
    """The weights don't fit the model; the message names the tensor and both shapes."""


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. Raises LoadError when it is missing or broken."""
    try:
        return json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LoadError(f"can't read {directory / 'config.json'}: {error}") from error


def choose_dtype(name: str, config: Mapping[str, Any], device: str) -> torch.dtype:
    """`auto` is float32 on CPU, elsewhere the checkpoint's."""
    if name == "auto":
        name = "float32" if device == "cpu" else config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if name not in DTYPES:
        raise LoadError(f"dtype '{name}' is not supported; supported: {', '.join(DTYPES)}")
    return DTYPES[name]


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint, in index order."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values())
        files = [directory / name for name in names]
    else:
        files = sorted(directory.glob("*.safetensors"))
    missing = [file.name for file in files if not file.is_file()]
    if not files or missing:
        raise LoadError(f"{directory} lacks {', '.join(missing) or 'any *.safetensors file'}")
    return files


def checked_targets(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """Where each of a checkpoint's tensors, by name and shape, goes; those that are not needed are left out.

    Raises LoadError on a missing, unexpected or mis-shaped tensor.
    """
    targets = _targets(model)
    found: dict[str, torch.Tensor] = {}
    filled: set[str] = set()
    for name, shape in shapes.items():
        place = name if name in targets else f"{model.base_prefix}{name}"
        target = targets.get(place)
        if target is None:
            if name.endswith(_IGNORED_SUFFIXES) or name == "lm_head.weight":  # tied: a copy of the embedding
                continue
            raise LoadError(f"checkpoint tensor {name} {list(shape)} has no place in {type(model).__name__}")
        if tuple(target.shape) != tuple(shape):
            raise LoadError(f"checkpoint tensor {name} is {list(shape)}, expected {list(target.shape)}")
        found[name] = target
        filled.add(place)
    missing = sorted(set(targets) - filled)
    if missing:
        first = missing[0]
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise LoadError(f"checkpoint lacks {first} {list(targets[first].shape)}{others}")
    return found


def load_checkpoint(model: nn.Module, directory: Path) -> None:
    """Fill every parameter of `model`. Raises LoadError on a missing, unexpected or mis-shaped tensor."""
    targets = checked_targets(model, {name: shape for shard, name, shape in _stored(directory)})
    for shard, name, _ in _stored(directory):
        if name in targets:
            targets[name].copy_(shard.get_tensor(name))


_DUMMY_ELEMENTS = 2**24
"""Generated at a time: a whole matrix in float32 would leave a hole in the allocator's memory that nobody fits into."""


def fill_dummy(model: nn.Module, seed: int) -> None:
    """Uniform in ±1e-3, generated on the model's device; the same for the same seed whatever the dtype."""
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    values = torch.empty(_DUMMY_ELEMENTS, dtype=torch.float32, device=device)
    for _, parameter in model.named_parameters():
        for piece in parameter.data.view(-1).split(_DUMMY_ELEMENTS):
            piece.copy_(values[: len(piece)].uniform_(-1e-3, 1e-3, generator=generator))


def fingerprint(config: Mapping[str, Any], directory: Path, dtype: torch.dtype, load_format: str, seed: int) -> str:
    """16 hex digits over what KV values depend on: the configuration, dtype, and the weights.

    Weights enter by name, size, safetensors header and a few samples of 4 KiB, so that it stays cheap for any size.
    """
    relevant = {key: value for key, value in config.items() if key not in _FINGERPRINT_IGNORES}
    state = hashlib.blake2b(json.dumps([relevant, str(dtype)], sort_keys=True).encode(), digest_size=8)
    if load_format == "dummy":
        state.update(f"dummy {seed}".encode())
        return state.hexdigest()
    for file in weight_files(directory):
        size = file.stat().st_size
        state.update(f"{file.name} {size}".encode())
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
            state.update(stream.read(min(header, 2**24)))
            for sample in range(16):
                stream.seek(max(8 + header, (size - 4096) * (sample + 1) // 16))
                state.update(stream.read(4096))
    return state.hexdigest()


def _stored(directory: Path) -> Iterator[tuple[Any, str, tuple[int, ...]]]:
    """(open file, tensor name, its shape) of every tensor."""
    from safetensors import SafetensorError, safe_open

    for file in weight_files(directory):
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - not a dict
                    yield shard, name, tuple(shard.get_slice(name).get_shape())
        except SafetensorError as error:
            raise LoadError(f"{file} is not a readable safetensors file: {error}") from error


def _targets(model: nn.Module) -> dict[str, torch.Tensor]:
    """Checkpoint name -> the parameter, or the rows of a merged parameter, that it fills."""
    fused: Mapping[str, tuple[str, ...]] = model.fused  # type: ignore[assignment]
    targets: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        parent, _, module_name = owner.rpartition(".")
        if module_name not in fused:
            targets[name] = parameter.data
            continue
        layer = model.get_submodule(owner)
        assert isinstance(layer, Linear)
        for part, rows in zip(fused[module_name], parameter.data.split(layer.shards), strict=True):
            targets[f"{parent}.{part}.{leaf}"] = rows
    return targets
