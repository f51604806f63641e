"""`--config file.yaml`: its keys are flag names (with - or _), and `model` is MODEL. The command line wins."""

import argparse
from pathlib import Path
from typing import Any

import yaml

from baton.proto.errors import UserError


def parse(parser: argparse.ArgumentParser, words: list[str]) -> argparse.Namespace:
    """parser.parse_args(words), with defaults from the file that --config in words names, if any."""
    finder = type(parser)(prog=parser.prog, description=None, add_help=False)
    finder.add_argument("--config")
    path = finder.parse_known_args(words)[0].config
    if path is None:
        return parser.parse_args(words)
    values = _read(Path(path))
    model = values.pop("model", None)
    from_file = parser.parse_args([word for key, value in values.items() for word in _words(parser, path, key, value)])
    args = parser.parse_args(words, namespace=from_file)
    if model is not None and args.model is None:
        args.model = str(model)
    return args


def _read(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"can't read --config {path}: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config {path} must map flag names to values, for example 'decode: 2'")
    for key, value in values.items():
        if value is None or (isinstance(value, list) and None in value):
            raise UserError(f"--config {path}: {key} has no value")
    return {str(key): value for key, value in values.items()}


def _words(parser: argparse.ArgumentParser, path: str, key: str, value: Any) -> list[str]:
    """One entry of the file as it would stand on the command line."""
    flag = "--" + key.replace("_", "-")
    known = parser._option_string_actions
    if flag not in known or flag == "--config":
        raise UserError(f"--config {path}: {parser.prog} has no option {flag}")
    if isinstance(value, bool) and known[flag].nargs == 0:
        if value:
            return [flag]
        opposite = "--" + flag.removeprefix("--no-") if flag.startswith("--no-") else "--no-" + flag.removeprefix("--")
        return [opposite] if opposite in known[flag].option_strings else []
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]
