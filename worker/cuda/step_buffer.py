"""One step's inputs as one run of 32-bit words: filled on the host in pinned memory, copied to the device at once.

The device copy stays at one address, so that a captured graph reads the step that was copied last.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from baton.kernels.cuda.work import PART_FIELDS, TILE_FIELDS

ALIGNMENT = 4
"""Words. Triton compiles a kernel once more for pointers that are not aligned to 16 bytes."""
DRAW_FIELDS = 8
"""uniform and top_p as float64, temperature float32, top_k int32, min_p float32, padding."""


@dataclass(frozen=True)
class StepLayout:
    """Room for so many tokens, sampled rows, and tiles of decode and prefill; block table updates follow behind.

    The lists of attention are there once for each of `windows`.
    """

    tokens: int
    samples: int
    decode: int
    prefill: int
    cut: int = 0
    """Decode rows that may be cut into several tiles."""
    windows: tuple[int, ...] = (0,)
    sequences: int = 0
    """Sequences of the step where a kernel takes them whole, else 0."""
    longest: int = 0
    """Most tokens of one of them."""
    prompt: int = 0
    """Tokens whose hidden states are wanted beside those of the sampled rows, behind them."""

    @cached_property
    def sections(self) -> dict[str, tuple[int, int, int]]:
        """Name -> (offset in words, rows, words a row). `draws` is first: its float64 need an aligned offset."""
        shapes = {
            "draws": (self.samples, DRAW_FIELDS),
            "sample_slots": (self.samples, 1),
            "logits_indices": (self.samples + self.prompt, 1),
            "token_ids": (self.tokens, 1),
            "positions": (self.tokens, 1),
            "token_slots": (self.tokens, 1),
            "sequences": (3 if self.sequences else 0, self.sequences + 1),
        }
        for window in self.windows:
            shapes[f"counts/{window}"] = (2, 1)
            shapes[f"decode/{window}"] = (self.decode, TILE_FIELDS)
            shapes[f"parts/{window}"] = (self.cut, PART_FIELDS)
            shapes[f"prefill/{window}"] = (self.prefill, TILE_FIELDS)
        offset, sections = 0, {}
        for name, (rows, words) in shapes.items():
            sections[name] = (offset, rows, words)
            offset += -(-rows * words // ALIGNMENT) * ALIGNMENT
        return sections

    @property
    def is_decode(self) -> bool:
        """Whether every token is one of a decode row and sampled."""
        return self.prefill == 0 and self.tokens == self.samples and not self.prompt

    @property
    def words(self) -> int:
        """Length without the table updates."""
        offset, rows, words = self.sections[f"prefill/{self.windows[-1]}"]
        return offset + -(-rows * words // ALIGNMENT) * ALIGNMENT


class StepInputs:
    """Named parts of a step's words, on the host or on the device.

    draws int32 [samples, DRAW_FIELDS]; sample_slots [samples]; logits_indices [samples + prompt]; token_ids (negative:
    the token that the slot sampled last), positions and token_slots (negative: padding) [tokens]; sequences
    [3, sequences + 1]: query_start, seq_lens and slots; for each window counts [2], decode, parts and prefill as in
    ops.DeviceLists.
    """

    def __init__(self, layout: StepLayout, words: torch.Tensor) -> None:
        self._layout, self._words = layout, words

    def __getitem__(self, name: str) -> torch.Tensor:
        """int32 [rows] or [rows, words a row]."""
        offset, rows, words = self._layout.sections[name]
        part = self._words[offset : offset + rows * words]
        return part if words == 1 else part.view(rows, words)

    @property
    def draw_columns(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """temperatures, top_k, top_p, min_p, uniforms: strided views [samples], in the order of Ops.draw."""
        draws = self["draws"]
        float32, float64 = draws.view(torch.float32), draws.view(torch.float64)
        return float32[:, 4], draws[:, 5], float64[:, 1], float32[:, 6], float64[:, 0]


class StepBuffer:
    """The device's words and a ring of pinned ones: a step's may be overwritten once its result has arrived."""

    def __init__(self, capacity: int, ring: int, device: torch.device) -> None:
        self.device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._hosts = [torch.zeros(capacity, dtype=torch.int32, pin_memory=True) for _ in range(ring)]
        self._next = 0

    def host(self) -> torch.Tensor:
        """Pinned words for the next step."""
        self._next = (self._next + 1) % len(self._hosts)
        return self._hosts[self._next]

    def upload(self, host: torch.Tensor, layout: StepLayout, updates: np.ndarray) -> torch.Tensor:
        """Copy the step and its table updates [n, 2] to the device; returns the updates there."""
        start, end = layout.words, layout.words + updates.size
        host[start:end].numpy()[:] = updates.reshape(-1)
        self.device[:end].copy_(host[:end], non_blocking=True)
        return self.device[start:end].view(-1, 2)
