"""What several parts must read alike in a model's config.json."""

from collections.abc import Mapping
from typing import Any


def is_headless(config: Mapping[str, Any]) -> bool:
    """Whether the model was saved without its language model head, as embedding models are: MistralModel, …"""
    names = config.get("architectures") or ()
    return bool(names) and all(name.endswith("Model") for name in names)
