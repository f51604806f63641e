"""Rotary position embedding (Su et al., 2021) and its scalings, as one table of cosines and sines.

Names and parameters are those of `rope_parameters` / `rope_scaling` in config.json. Frequencies are computed in float32
exactly as the reference implementation does: a rounding step elsewhere would show at long positions.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch


def cos_sin_table(rope: Mapping[str, Any], rotary_dim: int, max_positions: int, trained_len: int) -> torch.Tensor:
    """float32 [max_positions, rotary_dim]: cosines of the rotary_dim / 2 frequencies, then their sines.

    `trained_len` is max_position_embeddings. Raises ValueError for a scaling that is not known.
    """
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in _FREQUENCIES:
        raise ValueError(f"rope scaling '{kind}' is not supported; supported: {', '.join(_FREQUENCIES)}")
    inv_freq, scale = _FREQUENCIES[kind](rope, rotary_dim, max_positions, trained_len)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * inv_freq[None, :]
    return torch.cat([angles.cos() * scale, angles.sin() * scale], dim=-1).contiguous()


def _base_frequencies(base: float, dim: int) -> torch.Tensor:
    return 1.0 / (base ** (torch.arange(0, dim, 2, dtype=torch.int64).float() / dim))


def _default(rope: Mapping[str, Any], dim: int, max_positions: int, trained_len: int) -> tuple[torch.Tensor, float]:
    return _base_frequencies(rope["rope_theta"], dim), 1.0


def _linear(rope: Mapping[str, Any], dim: int, max_positions: int, trained_len: int) -> tuple[torch.Tensor, float]:
    """Position interpolation (Chen et al., 2023)."""
    return _base_frequencies(rope["rope_theta"], dim) / rope["factor"], 1.0


def _dynamic(rope: Mapping[str, Any], dim: int, max_positions: int, trained_len: int) -> tuple[torch.Tensor, float]:
    """NTK-aware base for the length that is served.

    A base that followed each sequence's length would not fit the keys already cached, so it is fixed: the trained one
    up to the trained length, beyond it the one for max_positions.
    """
    base, factor = rope["rope_theta"], rope["factor"]
    original = rope.get("original_max_position_embeddings") or trained_len
    length = max(max_positions, original)
    base = base * ((factor * length / original) - (factor - 1)) ** (dim / (dim - 2))
    return _base_frequencies(base, dim), 1.0


def _llama3(rope: Mapping[str, Any], dim: int, max_positions: int, trained_len: int) -> tuple[torch.Tensor, float]:
    """Llama 3.1: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    inv_freq = _base_frequencies(rope["rope_theta"], dim)
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    original = rope["original_max_position_embeddings"]
    wavelengths = 2 * math.pi / inv_freq
    smooth = (original / wavelengths - low) / (high - low)
    blended = (1 - smooth) * inv_freq / factor + smooth * inv_freq
    stretched = torch.where(wavelengths > original / low, inv_freq / factor, inv_freq)
    between = (wavelengths >= original / high) & (wavelengths <= original / low)
    return torch.where(between, blended, stretched), 1.0


def _yarn(rope: Mapping[str, Any], dim: int, max_positions: int, trained_len: int) -> tuple[torch.Tensor, float]:
    """YaRN (Peng et al., 2023): interpolation by parts, and a temperature folded into the table."""
    base, factor = rope["rope_theta"], rope["factor"]
    original = rope.get("original_max_position_embeddings") or trained_len
    low, high = _yarn_range(rope, dim, base, original)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    frequencies = base ** (torch.arange(0, dim, 2).float() / dim)
    inv_freq = (1 / (factor * frequencies)) * ramp + (1 / frequencies) * (1 - ramp)
    return inv_freq, _yarn_attention_factor(rope, factor)


def _yarn_range(rope: Mapping[str, Any], dim: int, base: float, original: int) -> tuple[float, float]:
    """First and last dimension that is blended between interpolation and the trained frequency."""

    def dimension(rotations: float) -> float:
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return low, high if high != low else high + 0.001


def _yarn_attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(rope["mscale"]) / magnitude(rope["mscale_all_dim"])
    return magnitude(1.0)


_FREQUENCIES = {"default": _default, "linear": _linear, "dynamic": _dynamic, "llama3": _llama3, "yarn": _yarn}
