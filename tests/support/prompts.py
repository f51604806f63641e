"""Prompts of prose and code that every machine has: the standard library's own."""

import argparse
import inspect
import random
import textwrap
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer


def library_tokens(model_dir: Path) -> list[int]:
    """Three modules of the standard library in the model's tokens."""
    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    text = "\n".join(inspect.getsource(module) for module in (textwrap, argparse, random))
    return tokenizer.encode(text, add_special_tokens=False).ids


def excerpts(ids: list[int], lengths: Sequence[int], seed: int) -> list[list[int]]:
    """Runs of so many tokens each, from places that follow the seed."""
    rng = random.Random(seed)
    starts = [rng.randrange(len(ids) - length) for length in lengths]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]
