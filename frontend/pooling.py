"""How this server makes embeddings: what the checkpoint and the flags say."""

from pathlib import Path
from typing import Any

import msgspec

from baton.proto.checkpoint import read_json_object
from baton.proto.config import PoolerConfig
from baton.proto.errors import UserError
from baton.proto.lifecycle import Pooling


class PoolingInfo(msgspec.Struct, frozen=True):
    """What a request gets that does not say otherwise, and what it may say."""

    pooling: Pooling
    normalize: bool
    hidden_size: int
    matryoshka: tuple[int, ...] | None
    """Dimensions that vectors may be cut to; empty: any; None: the model was not trained for it."""


def load_pooling_info(path: str, config: PoolerConfig) -> PoolingInfo:
    """From config.json, sentence-transformers' modules.json and 1_Pooling/config.json, and the flags, which go first.

    Raises UserError when the checkpoint wants something that this server can't do.
    """
    directory = Path(path)
    model = read_json_object(directory / "config.json")
    modules = _modules(directory)
    kinds = {kind for kind, _ in modules}
    pooling = Pooling(config.pooling_type or _checkpoint_pooling(directory, modules) or Pooling.LAST)
    if unknown := kinds - {"Transformer", "Pooling", "Normalize"}:
        raise UserError(
            f"{directory / 'modules.json'} puts {', '.join(sorted(unknown))} behind the model, which is not supported"
        )
    normalize = config.normalize
    if normalize is None:
        normalize = not modules or "Normalize" in kinds
    return PoolingInfo(pooling, normalize, int(model.get("hidden_size") or 0), _matryoshka(model, config))


def _matryoshka(model: dict[str, Any], config: PoolerConfig) -> tuple[int, ...] | None:
    if config.matryoshka_dimensions is not None:
        return config.matryoshka_dimensions
    if dimensions := model.get("matryoshka_dimensions"):
        return tuple(dimensions)
    return () if model.get("is_matryoshka") else None


def _modules(directory: Path) -> list[tuple[str, str]]:
    """Class and folder of each module; empty for a checkpoint that is not sentence-transformers'."""
    file = directory / "modules.json"
    if not file.is_file():
        return []
    try:
        modules = msgspec.json.decode(file.read_bytes(), type=list[dict[str, Any]])
        return [(str(module["type"]).rpartition(".")[2], str(module["path"])) for module in modules]
    except (msgspec.DecodeError, KeyError) as error:
        raise UserError(f"{file} is not sentence-transformers' list of modules: {error!r}") from error


def _checkpoint_pooling(directory: Path, modules: list[tuple[str, str]]) -> Pooling | None:
    """What the module of type Pooling says. Raises UserError for another way than those that there are."""
    folder = next((path for kind, path in modules if kind == "Pooling"), "1_Pooling")
    file = directory / folder / "config.json"
    content = read_json_object(file)
    chosen = {name for name, value in content.items() if name.startswith("pooling_mode_") and value is True}
    if isinstance(mode := content.get("pooling_mode"), str):  # the spelling of newer versions
        chosen = {f"pooling_mode_{mode}"}
    names = {
        "pooling_mode_lasttoken": Pooling.LAST,
        "pooling_mode_mean_tokens": Pooling.MEAN,
        "pooling_mode_mean": Pooling.MEAN,
    }
    if not chosen:
        return None
    if len(chosen) > 1 or not chosen <= names.keys():
        raise UserError(
            f"{file} asks for {', '.join(sorted(chosen))}, which is not supported; --pooling-type LAST or MEAN does "
            "something else instead"
        )
    return names[chosen.pop()]
