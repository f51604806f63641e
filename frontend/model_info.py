"""What the frontend knows of the model without its weights: limits, end tokens, sampling defaults."""

from pathlib import Path
from typing import Any

import msgspec

from baton.frontend.tokenizer import Tokenizer
from baton.proto.checkpoint import is_headless, read_json_object
from baton.proto.config import ModelConfig
from baton.proto.errors import UserError


class SamplingDefaults(msgspec.Struct, frozen=True):
    """generation_config.json as far as it concerns requests that leave something open."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    max_new_tokens: int | None = None


class ModelInfo(msgspec.Struct, frozen=True):
    """Of the model that is served."""

    names: tuple[str, ...]
    max_model_len: int
    vocab_size: int
    """Rows of the embedding: ids below it exist, also where the tokenizer has no text for them."""
    eos_ids: tuple[int, ...]
    defaults: SamplingDefaults
    eos_id: int | None = None
    """The tokenizer's own among `eos_ids`, whose end of an output is not worth a word. None: so is that of all."""
    generates: bool = True
    """False: the checkpoint has no language model head and makes embeddings alone."""


def load_model_info(config: ModelConfig, tokenizer: Tokenizer) -> ModelInfo:
    """From config.json and generation_config.json. Raises UserError."""
    directory = Path(config.path)
    model = read_json_object(directory / "config.json")
    generation = read_json_object(directory / "generation_config.json")
    max_model_len = config.max_model_len or int(model.get("max_position_embeddings") or 0)
    if not max_model_len:
        raise UserError(f"{directory / 'config.json'} has no max_position_embeddings: give --max-model-len")
    eos = _ids(generation.get("eos_token_id")) or _ids(model.get("eos_token_id"))
    eos_text = tokenizer.special_tokens.get("eos_token")
    eos_id = None if eos_text is None else tokenizer.id_of(eos_text)
    if eos_id is not None:
        eos = {*eos, eos_id}
    vocab_size = int(model.get("vocab_size") or tokenizer.vocab_size)
    eos = {id for id in eos if id < vocab_size}  # a tokenizer may know more tokens than its model
    try:
        defaults = _sampling_defaults(generation)
    except msgspec.ValidationError as error:
        raise UserError(f"{directory / 'generation_config.json'}: {error}") from error
    return ModelInfo(
        names=config.served_names,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        eos_ids=tuple(sorted(eos)),
        defaults=defaults,
        eos_id=eos_id if eos_id in eos else None,
        generates=not is_headless(model),
    )


def _sampling_defaults(generation: dict[str, Any]) -> SamplingDefaults:
    given = {name: generation.get(name) for name in SamplingDefaults.__struct_fields__}
    return msgspec.convert({name: value for name, value in given.items() if value is not None}, SamplingDefaults)


def _ids(value: int | list[int] | None) -> set[int]:
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set(value)
