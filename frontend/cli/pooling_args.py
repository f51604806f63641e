"""Flags of embeddings."""

import argparse
from pathlib import Path

from baton.frontend.cli import engine_args
from baton.frontend.pooling import load_pooling_info
from baton.proto.config import PoolerConfig
from baton.proto.lifecycle import Pooling


def add_arguments(group: argparse._ArgumentGroup) -> None:
    """What a checkpoint may also say itself, in sentence-transformers' files."""
    group.add_argument(
        "--pooling-type",
        type=str.upper,
        choices=[pooling.value for pooling in Pooling],
        help="a vector is the last token's hidden state, or the mean of all; default: the checkpoint's, or LAST",
    )
    group.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="vectors have length 1; default: the checkpoint's choice, or yes",
    )
    group.add_argument(
        "--matryoshka-dimensions",
        type=engine_args.positive,
        nargs="*",
        metavar="N",
        help="what a request's `dimensions` may be, any without N; default: as config.json says, or none",
    )


def pooler_config(args: argparse.Namespace) -> PoolerConfig:
    """The flags as configuration."""
    dimensions = args.matryoshka_dimensions
    return PoolerConfig(
        pooling_type=args.pooling_type or "",
        normalize=args.normalize,
        matryoshka_dimensions=None if dimensions is None else tuple(dimensions),
    )


def check(args: argparse.Namespace, directory: Path) -> None:
    """Raises UserError for a checkpoint whose way to embeddings is not supported."""
    load_pooling_info(str(directory), pooler_config(args))
