"""What the benchmark commands have in common: which requests, and where the result goes."""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from baton.frontend.cli import engine_args
from baton.proto.errors import UserError


def add_model(parser: argparse.ArgumentParser) -> None:
    """MODEL and its worker, for benchmarks without a server. vLLM names the model by --model."""
    parser.add_argument("--config", metavar="FILE", help="YAML file whose keys are these flags; the command line wins")
    engine_args.add_model_arguments(parser)
    engine_args.add_worker_arguments(parser)
    parser.add_argument("--model", dest="model_by_flag", metavar="MODEL", help="another way to give MODEL")


def settle_model(args: argparse.Namespace) -> None:
    """MODEL, in whichever way it was given, into args.model."""
    if args.model and args.model_by_flag:
        raise UserError(f"two models are given: {args.model} and --model {args.model_by_flag}")
    args.model = args.model or args.model_by_flag


def add_dataset(group: argparse._ArgumentGroup) -> None:
    """Which requests are sent."""
    number = engine_args.positive
    group.add_argument("--dataset-name", default="random", choices=("random", "sharegpt"))
    group.add_argument("--dataset-path", metavar="FILE", help="ShareGPT-style JSON")
    group.add_argument("--num-prompts", type=number, default=1000)
    group.add_argument("--random-input-len", "--input-len", type=number, default=1024, help="tokens")
    group.add_argument("--random-output-len", "--output-len", type=number, default=128, help="tokens")
    group.add_argument(
        "--random-range-ratio", type=ratio, default=0.0, help="lengths are uniform in [n (1 - r), n (1 + r)]"
    )
    group.add_argument("--sharegpt-output-len", type=number, help="tokens, instead of the recorded answer's length")


def sharegpt_path(args: argparse.Namespace) -> Path:
    """The file of conversations. Raises UserError when none was given."""
    if not args.dataset_path:
        raise UserError("--dataset-name sharegpt needs --dataset-path FILE")
    return Path(args.dataset_path)


def ratio(text: str) -> float:
    """From 0 up to, not including, 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"expected 0 <= ratio < 1, got {text}")
    return value


def rate(text: str) -> float:
    """Above 0, and inf is allowed."""
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def checked_path(path: Path) -> Path:
    """A file to write. Raises UserError, before a long run, when it can't be written."""
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UserError(f"can't write the result to {path}")
    return path


def write_json(path: Path, content: dict[str, Any], append: bool = False) -> None:
    """One object, one line."""
    with path.open("a" if append else "w", encoding="utf-8") as file:
        file.write(json.dumps(content) + "\n")
