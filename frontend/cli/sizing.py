"""Whether a model and its KV pools fit into this machine, judged from config.json before any process starts."""

import argparse
import json
import logging
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.proto.checkpoint import is_headless
from baton.proto.errors import UserError

DEFAULT_POOL_BYTES = 2**30
POOL_SHARE = 8
"""Without a size given, a pool takes 1 / POOL_SHARE of the free memory and at most DEFAULT_POOL_BYTES."""
PROCESS_BYTES = 300 * 2**20
"""Interpreter, libraries and activations of a worker, roughly."""
_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class ModelSize:
    """What a model needs."""

    max_position_embeddings: int
    weight_bytes: int
    kv_bytes_per_token: int


@dataclass(frozen=True)
class Plan:
    """What a worker is given."""

    max_model_len: int
    pool_bytes: int
    """0: given as a number of blocks, or left to the worker (CUDA)."""
    note: str = ""
    """For the log, when the plan departs from the model's own limit."""
    note_level: int = logging.INFO
    """WARNING when a pool size that the user has given is the cause: they may not have meant that."""


def read_model_size(directory: Path, dtype: str, load_format: str) -> ModelSize:
    """From config.json and the headers of the safetensors files."""
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        kv_heads = config.get("num_key_value_heads") or heads
        kv_elements = 2 * config["num_hidden_layers"] * kv_heads * head_dim
        max_len = int(config["max_position_embeddings"])
        parameters = _count_by_shape(config) if load_format == "dummy" else _count_stored(directory)
    except (OSError, ValueError, KeyError, TypeError, struct.error) as error:
        raise UserError(f"can't read the model in {directory}: {type(error).__name__}: {error}") from error
    width = _ELEMENT_BYTES["float32" if dtype == "auto" else dtype]
    return ModelSize(max_len, parameters * width, kv_elements * width)


def plan(args: argparse.Namespace, model: ModelSize, num_workers: int) -> Plan:
    """Context length and pool size for each of num_workers. Raises UserError when they don't fit."""
    if args.max_model_len and args.max_model_len > model.max_position_embeddings:
        raise UserError(f"--max-model-len {args.max_model_len} is beyond the model's {model.max_position_embeddings}")
    if args.device != "cpu":
        length = args.max_model_len or model.max_position_embeddings
        return Plan(length, args.kv_cache_memory_bytes or 0)
    free = available_memory()
    pool = _pool_bytes(args, model, free)
    needed = num_workers * (model.weight_bytes + pool + PROCESS_BYTES)
    if needed > free:
        raise UserError(
            f"too little memory: {num_workers} workers need {_gib(needed)} (each {_gib(model.weight_bytes)} weights, "
            f"{_gib(pool)} KV pool), {_gib(free)} are free; use fewer workers, a smaller --kv-cache-memory-bytes "
            "or --dtype bfloat16"
        )
    return _fit_length(args, model, pool)


def _pool_bytes(args: argparse.Namespace, model: ModelSize, free: int) -> int:
    if args.num_blocks:
        return args.num_blocks * args.block_size * model.kv_bytes_per_token
    if args.kv_cache_memory_bytes:
        return args.kv_cache_memory_bytes
    longest = _blocks(args.max_model_len or 0, args.block_size) * args.block_size * model.kv_bytes_per_token
    return max(min(DEFAULT_POOL_BYTES, free // POOL_SHARE), longest)


def _fit_length(args: argparse.Namespace, model: ModelSize, pool: int) -> Plan:
    """A stream as long as the context must fit into an empty pool, or it could never end."""
    capacity = pool // (args.block_size * model.kv_bytes_per_token) * args.block_size
    wanted = args.max_model_len or model.max_position_embeddings
    pool_bytes = 0 if args.num_blocks else pool
    if capacity >= wanted:
        return Plan(wanted, pool_bytes)
    if args.max_model_len or not capacity:
        raise UserError(
            f"the KV pool holds {capacity} tokens, fewer than the context of {wanted}: give --num-blocks "
            f"{_blocks(wanted, args.block_size)} or more, or a smaller --max-model-len"
        )
    note = f"the context is {capacity} tokens, what the KV pool holds, instead of the model's {wanted}"
    given = args.num_blocks or args.kv_cache_memory_bytes
    return Plan(capacity, pool_bytes, note, logging.WARNING if given else logging.INFO)


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this machine, or this container, can still give. Files that were read, weights above all, are charged
    to a container too, and given up when anything else needs the memory."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        charged = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    return free if limit == "max" else min(free, int(limit) - used + int(charged["inactive_file"]))


def _count_stored(directory: Path) -> int:
    """Elements of all tensors. A safetensors file begins with the length of its JSON header, 8 bytes little-endian."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError("there is no *.safetensors file")
    total = 0
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 2**27)))
        total += sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")
    return total


def _count_by_shape(config: dict[str, Any]) -> int:
    """Parameters of a Llama-family model, norms and biases left out."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // heads
    kv_heads = config.get("num_key_value_heads") or heads
    attention = 2 * hidden * head_dim * (heads + kv_heads)
    mlp = 3 * hidden * config["intermediate_size"]
    embeddings = config["vocab_size"] * hidden * (1 if config.get("tie_word_embeddings") or is_headless(config) else 2)
    return embeddings + config["num_hidden_layers"] * (attention + mlp)


def _blocks(tokens: int, block_size: int) -> int:
    return -(-tokens // block_size)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
