"""Make the key of a cluster that spans hosts."""

import argparse
from pathlib import Path

from baton.proto.curve import create_key


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """All flags of `baton keys new`."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write cluster.key; made when missing")


def run(args: argparse.Namespace) -> int:
    """Write it; the exit code."""
    path = create_key(args.directory)
    print(f"wrote {path}: copy it to every host of the cluster, readable by its owner alone, and give --key-file there")
    return 0
