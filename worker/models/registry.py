"""Which class serves an architecture named in config.json. Classes are imported when they are needed."""

import importlib
from collections.abc import Mapping
from typing import Any

from baton.proto.errors import UserError

_LLAMA = ("llama", "LlamaForCausalLM", "LlamaConfig")

_MODELS = {
    **dict.fromkeys(("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"), _LLAMA),
    # Without a head: embedding models such as E5-Mistral.
    **dict.fromkeys(("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model"), _LLAMA),
}


class UnsupportedError(UserError, ValueError):
    """There is no code here for a model."""


def find_model(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """(model class, its config class) for config.json's content. Raises UnsupportedError naming what is supported."""
    names = config.get("architectures") or []
    for name in names:
        if name in _MODELS:
            file, model, model_config = _MODELS[name]
            module = importlib.import_module(f"baton.worker.models.{file}")
            return getattr(module, model), getattr(module, model_config)
    raise UnsupportedError(
        f"architecture {', '.join(names) or '(none)'} is not supported; supported: {', '.join(_MODELS)}"
    )
