"""Texts and token ids that become vectors: checked, tokenised and cut to what the request allows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from baton.frontend.api.embedding_requests import EmbeddingRequest, RerankRequest, ScoreRequest
from baton.frontend.api.errors import bad_request
from baton.frontend.api.params import check_vocabulary
from baton.frontend.api.prompts import Prompt, read_salt
from baton.frontend.model_info import ModelInfo
from baton.frontend.tokenizer import Side, Tokenizer
from baton.proto.hashing import hash_chain, pack_hashes

PoolingRequest = EmbeddingRequest | ScoreRequest | RerankRequest

MAX_INPUTS = 2048
"""Of one request, as at OpenAI."""


@dataclass(frozen=True)
class Cut:
    """How inputs are tokenised, made to fit and named in the prefix cache."""

    add_special_tokens: bool
    max_tokens: int | None
    """Longer inputs are cut to so many; None: what the model can't take is an error."""
    side: Side
    """Which end is cut off."""
    salt: tuple[str, ...] = ()
    """Extra keys of the hash chains."""


def read_cut(request: PoolingRequest, info: ModelInfo) -> Cut:
    """Raises ApiError naming the field."""
    limit, name = request.truncate_prompt_tokens, "truncate_prompt_tokens"
    if limit is not None and limit != -1 and not 1 <= limit <= info.max_model_len:
        raise bad_request(f"{name} must be -1 or from 1 to {info.max_model_len}, got {limit}.", name)
    limit = info.max_model_len if limit == -1 else limit
    side, salt = request.truncation_side or "right", read_salt(request.cache_salt)
    return Cut(request.add_special_tokens is not False, limit, side, salt)


def check_count(count: int, param: str) -> None:
    """Raises ApiError when there is nothing to do, or too much."""
    if not 1 <= count <= MAX_INPUTS:
        raise bad_request(f"{param} has {count} inputs; from 1 to {MAX_INPUTS} are possible in one request.", param)


def prompts_of(
    inputs: Sequence[str | Sequence[int]], cut: Cut, tokenizer: Tokenizer, info: ModelInfo, param: str
) -> list[Prompt]:
    """A prompt for each text or list of token ids. Raises ApiError naming `param` and which of the inputs is wrong."""
    return [_prompt(each, cut, tokenizer, info, param, index) for index, each in enumerate(inputs)]


def _prompt(
    given: str | Sequence[int], cut: Cut, tokenizer: Tokenizer, info: ModelInfo, param: str, index: int
) -> Prompt:
    ids = (
        _encode(given, cut, tokenizer, info, param, index)
        if isinstance(given, str)
        else _check(given, cut, info, param)
    )
    if not ids:
        raise bad_request(f"input {index} is empty; it needs at least one token.", param)
    _check_length(len(ids), info, param, index)
    tokens = np.array(ids, dtype=np.int32)
    check_vocabulary((int(tokens.max()),), info, param)
    return Prompt(tokens, pack_hashes(hash_chain(tokens, *cut.salt)))


def _encode(text: str, cut: Cut, tokenizer: Tokenizer, info: ModelInfo, param: str, index: int) -> Sequence[int]:
    """Text that can't fit is not tokenised: that would take its time."""
    text = text.encode(errors="replace").decode()
    if cut.max_tokens is None:
        _check_length(len(text.encode()) // tokenizer.max_token_bytes, info, param, index)
        return tokenizer.encode(text, cut.add_special_tokens)
    return tokenizer.encode_truncated(text, cut.add_special_tokens, cut.max_tokens, cut.side)


def _check(ids: Sequence[int], cut: Cut, info: ModelInfo, param: str) -> Sequence[int]:
    check_vocabulary(ids, info, param)
    if cut.max_tokens is None:
        return ids
    return ids[: cut.max_tokens] if cut.side == "right" else ids[-cut.max_tokens :]


def _check_length(count: int, info: ModelInfo, param: str, index: int) -> None:
    if count > info.max_model_len:
        raise bad_request(
            f"This model's maximum context length is {info.max_model_len} tokens. However, input {index} has at least "
            f"{count}. Please shorten it, or let truncate_prompt_tokens cut it.",
            param,
            "context_length_exceeded",
        )
