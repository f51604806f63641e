"""Flags that describe a model and a worker, shared by the commands that start workers; vLLM's names where they fit."""

import argparse
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from baton.proto.config import KV_TRANSFERS, BatchConfig, CacheConfig, ModelConfig
from baton.proto.errors import UserError
from baton.proto.lifecycle import Role
from baton.proto.supervision import EXIT_USER_ERROR, die_with_parent

MAX_NUMBER = 2**31 - 1
"""Counts and indices are 32-bit in kernels."""
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """What is served."""
    group = parser.add_argument_group("model")
    group.add_argument("model", nargs="?", help="Hugging Face directory, .gguf file, hub id, or 'demo'")
    group.add_argument("--tokenizer", default="", help="directory or tokenizer.json; default: the model's")
    group.add_argument("--revision", default="", help="branch, tag or commit of a hub model")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "float16", "bfloat16"),
        help="of weights and activations; auto: the checkpoint's, float32 on CPU",
    )
    group.add_argument(
        "--batch-invariant",
        action="store_true",
        help="on a GPU: logits have the same bits whatever else is in the batch, at some cost; on CPU they always have",
    )
    group.add_argument(
        "--load-format",
        default="auto",
        choices=("auto", "dummy"),
        help="dummy: random weights of the shape in config.json",
    )
    group.add_argument("--max-model-len", type=positive, help="prompt plus output tokens; default: the model's limit")
    group.add_argument("--seed", type=int, default=0, help="of dummy weights")


def add_worker_arguments(parser: argparse.ArgumentParser) -> None:
    """How a worker runs it."""
    group = parser.add_argument_group("worker")
    group.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    group.add_argument(
        "--gpus",
        type=gpu_list,
        help="GPUs for the workers, in turn, for example 0,1; default: one each, the first ones",
    )
    group.add_argument(
        "--gpu-memory-utilization",
        type=share,
        default=0.9,
        help="share of a GPU's memory for weights, activations and KV pools of all workers on it",
    )
    group.add_argument("--block-size", type=block_size, default=16, help="tokens per KV block, a multiple of 16")
    group.add_argument(
        "--num-blocks", "--num-gpu-blocks-override", type=positive, help="KV blocks of each worker", dest="num_blocks"
    )
    group.add_argument(
        "--kv-cache-memory-bytes",
        type=size,
        help="KV pool of each worker, for example 512M; default: up to 1 GiB, all that is left on a GPU",
    )
    group.add_argument("--enable-prefix-caching", action=argparse.BooleanOptionalAction, default=True)
    group.add_argument(
        "--max-num-batched-tokens", type=positive, help="token budget of a step; default: 256, 8192 on a GPU"
    )
    group.add_argument("--max-num-seqs", type=positive, help="streams in one step at most; default: 256, 1024 on a GPU")
    group.add_argument(
        "--target-itl-ms",
        type=milliseconds,
        metavar="MS",
        help="time between two tokens that prompts leave to running streams, 0: none; default: 15 on a GPU, 0 on CPU",
    )
    group.add_argument(
        "--attention-backend",
        default="auto",
        choices=("auto", "triton", "fa3"),
        help="GPU kernels of attention; auto: the fastest as measured, fa3: FlashAttention-3 for prompts (extra 'fa3')",
    )
    group.add_argument("--threads", type=threads, help="compute threads of each CPU worker; default: all cores")


def add_kv_transfer_arguments(parser: argparse.ArgumentParser) -> None:
    """How workers get blocks from each other."""
    parser.add_argument(
        "--kv-transfer",
        default="auto",
        choices=("auto", "local", *sorted({name for names in KV_TRANSFERS.values() for name in names})),
        help="how KV blocks come from other workers; auto: the best that a pair has, as the log tells; local: only in "
        "a pool that workers share, where blocks change owner and no byte moves",
    )
    parser.add_argument(
        "--early-bind-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="prompts of N tokens or more are handed over chunk by chunk while the rest is computed",
    )


def number(text: str) -> float:
    """NaN, which no bound allows, for what is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def share(text: str) -> float:
    """A number above 0 and up to 1."""
    value = number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return value


def milliseconds(text: str) -> float:
    """A finite number, 0 or more."""
    value = number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected milliseconds, 0 or more, got {text!r}")
    return value


def gpu_list(text: str) -> tuple[int, ...]:
    """Indices separated by commas, none twice."""
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise argparse.ArgumentTypeError(f"expected GPU indices such as 0,1, got {text!r}")
    return tuple(int(part) for part in parts)


def gpus_of(args: argparse.Namespace, num_workers: int) -> list[int]:
    """The GPU of each worker; 0 where there is none."""
    if args.device != "cuda":
        return [0] * num_workers
    return [args.gpus[index % len(args.gpus)] if args.gpus else index for index in range(num_workers)]


def check_kv_transfer(args: argparse.Namespace, roles: Sequence[Role]) -> None:
    """Raises UserError when blocks could not move as asked."""
    possible = KV_TRANSFERS[args.device]
    if args.kv_transfer == "local" and set(roles) != {Role.UNIFIED}:
        if args.enable_prefix_caching:
            raise UserError(
                "--kv-transfer local hands blocks over, and a prefix cache keeps them: add --no-enable-prefix-caching, "
                "or let --kv-transfer auto copy them"
            )
        if len(set(gpus_of(args, len(roles)))) > 1:
            raise UserError("--kv-transfer local needs all workers on one GPU, as with --gpus 0")
    if args.kv_transfer not in ("auto", "local", *possible):
        raise UserError(f"--device {args.device} has no --kv-transfer {args.kv_transfer}, only {', '.join(possible)}")


def positive(text: str) -> int:
    """A whole number above 0."""
    return _whole(text, 1, "above 0")


def count(text: str) -> int:
    """A whole number from 0."""
    return _whole(text, 0, "from 0")


def _whole(text: str, least: int, bound: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() else -1
    if value < least:
        raise argparse.ArgumentTypeError(f"expected a whole number {bound}, got {text!r}")
    if value > MAX_NUMBER:
        raise argparse.ArgumentTypeError(f"at most {MAX_NUMBER} is possible, got {text}")
    return value


def threads(text: str) -> int:
    """From 1 to the number of this machine's cores."""
    value = positive(text)
    cores = os.cpu_count() or 1
    if value > cores:
        raise argparse.ArgumentTypeError(f"this machine has {cores} cores, got {text}")
    return value


def non_empty(text: str) -> str:
    """Something other than white space."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"expected a value, got {text!r}")
    return text


def block_size(text: str) -> int:
    """A positive multiple of 16."""
    value = positive(text)
    if value % 16:
        raise argparse.ArgumentTypeError(f"expected a multiple of 16, got {value}")
    return value


def size(text: str) -> int:
    """Bytes: 1073741824, 512M, 1GiB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([kmgt]?)(?:i?b)?", text.strip().lower())
    value = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"expected a size such as 512M or 2GiB, got {text!r}")
    return value


def resolve_model(args: argparse.Namespace) -> Path:
    """The local directory of args.model, obtained and converted where needed, with progress on stderr.

    A worker's module does it, in a process of its own: this one loads neither torch nor gguf.
    """
    if args.model is None:
        raise UserError("MODEL is missing: give a directory, a .gguf file, a hub id, or 'demo'")
    dtype = "float32" if args.dtype == "auto" else args.dtype
    command = [sys.executable, "-P", "-m", "baton.worker.weights.resolve", "--dtype", dtype]
    if args.revision:
        command += ["--revision", args.revision]
    done = subprocess.run(
        [*command, "--", args.model], stdout=subprocess.PIPE, text=True, check=False, preexec_fn=die_with_parent
    )
    if done.returncode == EXIT_USER_ERROR:
        # It has printed the one line that explains.
        raise SystemExit(EXIT_USER_ERROR)
    if done.returncode:
        raise UserError(f"{args.model} can't be made ready: the resolver ended with {done.returncode}")
    return Path(json.loads(done.stdout)["path"])


def model_config(args: argparse.Namespace, path: Path, max_model_len: int) -> ModelConfig:
    """What is served, for workers and frontends."""
    return ModelConfig(
        path=str(path),
        served_names=tuple(getattr(args, "served_model_name", None) or (args.model,)),
        dtype=args.dtype,
        batch_invariant=args.batch_invariant,
        load_format=args.load_format,
        max_model_len=max_model_len,
        tokenizer=_absolute(args.tokenizer, "--tokenizer"),
        chat_template=_absolute(getattr(args, "chat_template", ""), "--chat-template"),
        seed=args.seed,
    )


def cache_config(args: argparse.Namespace, pool_bytes: int) -> CacheConfig:
    """A worker's pool."""
    return CacheConfig(
        block_size=args.block_size,
        num_blocks=args.num_blocks or 0,
        kv_cache_memory_bytes=pool_bytes,
        gpu_memory_utilization=args.gpu_memory_utilization,
        enable_prefix_caching=args.enable_prefix_caching,
    )


def batch_config(args: argparse.Namespace) -> BatchConfig:
    """A worker's iterations."""
    return BatchConfig(
        max_num_batched_tokens=args.max_num_batched_tokens or 0,
        max_num_seqs=args.max_num_seqs or 0,
        target_itl_ms=args.target_itl_ms,
    )


def _absolute(path: str, flag: str) -> str:
    if not path:
        return ""
    if not Path(path).exists():
        raise UserError(f"{flag} {path}: no such file or directory")
    return str(Path(path).resolve())
