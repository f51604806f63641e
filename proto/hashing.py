"""Content addresses of KV blocks: a hash chain over (parent hash, token ids, extra keys).

Hashes count units of HASH_UNIT tokens whatever the block size is, so that workers with different block sizes can be
compared; a block of k units is named by the hash of its last unit. Only full units have a hash.
"""

import hashlib
from functools import lru_cache

import numpy as np

HASH_UNIT = 16
"""Tokens per hashed unit; a block size is a multiple of it."""

HASH_BYTES = 16
"""Length of one hash: 128 bits of BLAKE2b, so that a collision never happens by chance."""


@lru_cache(1024)
def root_hash(*extra_keys: str) -> bytes:
    """Parent of the first unit. Extra keys (model fingerprint, adapter, tenant salt) separate caches."""
    return hashlib.blake2b("\x1f".join(extra_keys).encode(), digest_size=HASH_BYTES).digest()


def extend_chain(parent: bytes, token_ids: np.ndarray) -> list[bytes]:
    """Hashes of the full units in `token_ids` (int32 [n]), continuing the chain from `parent`."""
    data = np.ascontiguousarray(token_ids, dtype=np.int32).tobytes()
    unit_bytes = HASH_UNIT * 4
    hashes = []
    for start in range(0, len(data) - unit_bytes + 1, unit_bytes):
        parent = hashlib.blake2b(data[start : start + unit_bytes], digest_size=HASH_BYTES, key=parent).digest()
        hashes.append(parent)
    return hashes


def hash_chain(token_ids: np.ndarray, *extra_keys: str) -> list[bytes]:
    """The whole chain of a sequence: the root first, then one hash per full unit."""
    root = root_hash(*extra_keys)
    return [root, *extend_chain(root, token_ids)]


def pack_hashes(hashes: list[bytes]) -> bytes:
    """One frame of concatenated hashes."""
    return b"".join(hashes)


def extend_packed(packed: bytes, token_ids: np.ndarray) -> bytes:
    """A packed chain, root first, continued over the full units of `token_ids` (int32 [n]) that it does not cover."""
    covered = (len(packed) // HASH_BYTES - 1) * HASH_UNIT
    return packed + pack_hashes(extend_chain(packed[-HASH_BYTES:], token_ids[covered:]))


def unpack_hashes(frame: bytes | memoryview) -> list[bytes]:
    """Inverse of pack_hashes. Raises ValueError on a frame whose length is not a multiple of HASH_BYTES."""
    if len(frame) % HASH_BYTES:
        raise ValueError(f"hash frame of {len(frame)} bytes; expected a multiple of {HASH_BYTES}")
    data = bytes(frame)
    return [data[i : i + HASH_BYTES] for i in range(0, len(data), HASH_BYTES)]
