"""A pooled vector's last steps. Workers deliver the hidden state as it is."""

import numpy as np

TINY = 1e-12
"""Norms are at least this, as in torch.nn.functional.normalize."""


def finish_vector(pooled: bytes, dimensions: int | None, normalize: bool) -> np.ndarray:
    """float32 [hidden_size], little-endian, as a worker sent it -> float32 [dimensions or hidden_size].

    A cut vector is normalised again (Kusupati et al., 2022): the norm is that of what is left.
    """
    vector = np.frombuffer(pooled, dtype="<f4")[:dimensions]
    if not normalize:
        return vector
    return (vector / max(float(np.linalg.norm(vector.astype(np.float64))), TINY)).astype(np.float32)


def cosine(one: np.ndarray, other: np.ndarray) -> float:
    """Cosine similarity of two vectors float32 [n]."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(a @ b / max(float(np.linalg.norm(a) * np.linalg.norm(b)), TINY))
