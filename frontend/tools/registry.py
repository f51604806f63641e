"""Parsers by the names that --tool-call-parser and --reasoning-parser take; a module is imported when asked for."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from baton.frontend.tools.parser import Parser, ReasoningParser, ToolParser
from baton.proto.errors import UserError

_HERE = "baton.frontend.tools"
TOOL_PARSERS = {
    "hermes": "hermes",
    "qwen": "hermes",
    "llama3_json": "llama",
    "llama4_json": "llama",
    "mistral": "mistral",
    "deepseek_v3": "deepseek",
    "deepseek_v31": "deepseek",
    "deepseek_v32": "dsml",
    "glm45": "glm",
    "glm47": "glm",
}
"""Name -> module."""
REASONING_PARSERS = dict.fromkeys(("deepseek_r1", "deepseek_v3", "deepseek_v31", "glm45", "mistral", "qwen3"), "think")

P = TypeVar("P", bound=Parser)


def find_tool_parser(name: str, plugin: str = "") -> type[ToolParser]:
    """The parser of this name, also out of the file `plugin`. Raises UserError."""
    return _find(name, ToolParser, TOOL_PARSERS, plugin, "--tool-call-parser")  # type: ignore[type-abstract]


def find_reasoning_parser(name: str, plugin: str = "") -> type[ReasoningParser]:
    """The parser of this name, also out of the file `plugin`. Raises UserError."""
    return _find(name, ReasoningParser, REASONING_PARSERS, plugin, "--reasoning-parser")  # type: ignore[type-abstract]


def _find(name: str, kind: type[P], known: dict[str, str], plugin: str, flag: str) -> type[P]:
    modules = [_load_plugin(plugin)] if plugin else []
    if name in known:
        modules.append(importlib.import_module(f"{_HERE}.{known[name]}"))
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, kind) and name in value.names:
                return value
    raise UserError(f"{flag} {name}: there is no such parser; known are {', '.join(sorted(known))}")


def _load_plugin(path: str) -> ModuleType:
    file = Path(path).resolve()
    name = f"baton_plugin_{file.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"{path} is not a Python file; --tool-parser-plugin takes one")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's file raises
        raise UserError(f"{path} can't be imported: {type(error).__name__}: {error}") from error
    sys.modules[name] = module
    return module
