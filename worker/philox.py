"""Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).

A draw is a pure function of (seed, sample index, output index, purpose): it depends neither on the batch nor on the
worker, so that a stream that moved or was recovered draws what it would have drawn.
"""

from enum import IntEnum

import numpy as np

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)


class Purpose(IntEnum):
    """The last counter word: independent draws at one output position."""

    TOKEN = 0


def philox4x32(counters: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Ten rounds. counters uint32 [n, 4], keys uint32 [n, 2] -> uint32 [n, 4]."""
    c0, c1, c2, c3 = (counters[:, word].astype(np.uint64) for word in range(4))
    k0, k1 = (keys[:, word].astype(np.uint64) for word in range(2))
    for _ in range(10):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> _SHIFT) ^ c1 ^ k0,
            product1 & _LOW,
            (product0 >> _SHIFT) ^ c3 ^ k1,
            product0 & _LOW,
        )
        k0, k1 = (k0 + np.uint64(_WEYL[0])) & _LOW, (k1 + np.uint64(_WEYL[1])) & _LOW
    return np.stack([c0, c1, c2, c3], axis=1).astype(np.uint32)


def uniforms(
    seeds: np.ndarray, sample_indices: np.ndarray, output_indices: np.ndarray, purpose: Purpose = Purpose.TOKEN
) -> np.ndarray:
    """One float64 in [0, 1) with 53 random bits per row. seeds uint64 [n], the indices integers [n]."""
    seeds = seeds.astype(np.uint64)
    keys = np.stack([seeds & _LOW, seeds >> _SHIFT], axis=1).astype(np.uint32)
    counters = np.zeros((len(seeds), 4), dtype=np.uint32)
    counters[:, 0], counters[:, 1], counters[:, 2] = output_indices, sample_indices, int(purpose)
    words = philox4x32(counters, keys).astype(np.uint64)
    return (((words[:, 0] << _SHIFT) | words[:, 1]) >> np.uint64(11)) * 2.0**-53
