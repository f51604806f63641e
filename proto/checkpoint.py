"""What several parts must read alike in a model's directory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from baton.proto.errors import UserError


def is_headless(config: Mapping[str, Any]) -> bool:
    """Whether config.json is of a model saved without its language model head, as MistralModel is."""
    names = config.get("architectures") or ()
    return bool(names) and all(name.endswith("Model") for name in names)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is no file."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
