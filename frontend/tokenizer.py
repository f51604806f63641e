"""Text to token ids and back, with the `tokenizers` library: tokenizer.json and tokenizer_config.json of a model."""

import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import tokenizers

from baton.proto.config import ModelConfig
from baton.proto.errors import UserError

Side = Literal["left", "right"]

_SLACK_TOKENS = 64
"""How many tokens at the place of a cut may differ from those of the whole text."""

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # prompts are tokenised in threads of ours, one by one

_SPECIAL_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """A model's tokenizer. Encoding and decoding may run in any thread.

    They go through the library's calls for batches, because those for one text hold the GIL: a prompt of 1,000 tokens
    would stop every stream for 2 ms.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any] | None = None) -> None:
        """`config` is the content of tokenizer_config.json."""
        backend.no_truncation()
        backend.no_padding()
        self.config = config or {}
        self._backend = backend
        self.special_tokens = {role: text for role in _SPECIAL_ROLES if (text := _content(self.config.get(role)))}
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.spelling = _Spelling(backend)
        """Token id -> what it adds to the text, as bytes when they are not whole characters; only if byte_level."""
        self._texts = _Texts(backend)
        self._bos_id = self._missing_bos()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; add_special_tokens also adds what the model expects around it (usually BOS)."""
        ids: list[int] = self._encoding(text, add_special_tokens).ids
        if add_special_tokens and self._bos_id is not None and ids[:1] != [self._bos_id]:
            return [self._bos_id, *ids]
        return ids

    def encode_truncated(self, text: str, add_special_tokens: bool, count: int, side: Side) -> list[int]:
        """As encode, but at most `count` ids: text is lost on that side, special tokens around it are not."""
        most = (count + _SLACK_TOKENS) * self.max_token_bytes  # what is lost in any case costs no time
        text = text[-most:] if side == "left" else text[:most]
        encoding = self._encoding(text, add_special_tokens=False)
        special = self._backend.num_special_tokens_to_add(False) if add_special_tokens else 0
        bos = [self._bos_id] if add_special_tokens and self._bos_id is not None else []
        encoding.truncate(max(count - special - len(bos), 0), direction=side)
        ids: list[int] = self._backend.post_process(encoding, add_special_tokens=add_special_tokens).ids
        return [*bos, *ids]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        text: str
        (text,) = self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)
        return text

    def _encoding(self, text: str, add_special_tokens: bool) -> tokenizers.Encoding:
        (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
        return encoding

    def token(self, id: int) -> str:
        """One token as its own text, for logprobs."""
        return self._texts[id]

    def piece(self, id: int) -> str | None:
        """The token as the vocabulary spells it, e.g. 'Ġthe'."""
        piece: str | None = self._backend.id_to_token(id)
        return piece

    def id_of(self, piece: str) -> int | None:
        """Inverse of piece."""
        id: int | None = self._backend.token_to_id(piece)
        return id

    def token_bytes(self, id: int) -> bytes:
        """The bytes that a token adds to the text; only for byte_level tokenizers."""
        spelling = self.spelling[id]
        return spelling.encode() if isinstance(spelling, str) else spelling

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's own object, to read from."""
        return self._backend

    @cached_property
    def byte_level(self) -> bool:
        """Whether every token stands for fixed bytes, so that decoding is concatenation."""
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        parts = decoder["decoders"] if decoder.get("type") == "Sequence" else [decoder]
        return [part.get("type") for part in parts] == ["ByteLevel"]

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return max(self._backend.get_vocab().values()) + 1

    @cached_property
    def max_token_bytes(self) -> int:
        """An upper bound of the UTF-8 bytes of text that one token covers."""
        return max(len(piece.encode()) for piece in self._backend.get_vocab())

    def _missing_bos(self) -> int | None:
        """BOS, when the configuration asks for it and tokenizer.json does not add it by itself."""
        if not self.config.get("add_bos_token") or "bos_token" not in self.special_tokens:
            return None
        bos: int | None = self._backend.token_to_id(self.special_tokens["bos_token"])
        return None if bos in self._backend.encode("", add_special_tokens=True).ids else bos


class _Spelling(dict[int, str | bytes]):
    """Filled as ids are looked up."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def __missing__(self, id: int) -> str | bytes:
        data = _byte_level(self._backend.id_to_token(id) or "")
        try:
            spelling: str | bytes = data.decode()
        except UnicodeDecodeError:
            spelling = data
        self[id] = spelling
        return spelling


class _Texts(dict[int, str]):
    """Each token decoded alone; filled as ids are looked up."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend

    def __missing__(self, id: int) -> str:
        text: str = self._backend.decode([id], skip_special_tokens=False)
        self[id] = text
        return text


def load_tokenizer(config: ModelConfig) -> Tokenizer:
    """The tokenizer that the configuration names. Raises UserError when there is none or it cannot be read."""
    path = Path(config.tokenizer or config.path)
    directory, file = (path, path / "tokenizer.json") if path.is_dir() else (path.parent, path)
    if not file.is_file():
        raise UserError(f"{file} does not exist; name a directory with a tokenizer.json, or the file, by --tokenizer")
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise UserError(f"{file} is not a tokenizer that this version of `tokenizers` can read: {error}") from error
    return Tokenizer(backend, _load_tokenizer_config(directory))


def _load_tokenizer_config(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json, completed by the files that newer and older versions of transformers keep beside it."""
    config: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (directory / name).is_file():
            config |= json.loads((directory / name).read_text())
    template = directory / "chat_template.jinja"
    if template.is_file():
        config["chat_template"] = template.read_text()
    return config


def _content(token: Any) -> str:
    """A special token is given as its text or as a description of it."""
    if isinstance(token, dict):
        return str(token.get("content") or "")
    return str(token or "")


def _byte_chars() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: printable ones for themselves, others from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_CHARS = _byte_chars()


def _byte_level(piece: str) -> bytes:
    """Bytes of a byte-level token; added tokens that contain other characters stand for themselves."""
    try:
        return bytes(_BYTE_CHARS[char] for char in piece)
    except KeyError:
        return piece.encode()
