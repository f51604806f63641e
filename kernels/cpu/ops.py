"""The C kernels as an ops.Ops for float32 on CPU. ctypes releases the GIL while one runs."""

import ctypes
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch

from baton.kernels.ops import Norm, PackedWeight

MAX_HEAD_DIM = 256

_SIGNATURES = {
    "baton_panel_width": (),
    "baton_linear": (c_void_p, c_int64, *[c_void_p] * 4, *[c_int64] * 3, c_int),
    "baton_rms_norm": (*[c_void_p] * 2, c_float, c_void_p, *[c_int64] * 2, c_int),
    "baton_silu_and_mul": (*[c_void_p] * 2, *[c_int64] * 2, c_int),
    "baton_rope_and_cache": (*[c_void_p] * 7, c_float, *[c_int64] * 8, c_int),
    "baton_draw": (*[c_void_p] * 7, *[c_int64] * 2, c_int),
    "baton_logsumexp": (*[c_void_p] * 2, *[c_int64] * 2, c_int),
    "baton_paged_attention": (c_void_p, c_int64, *[c_void_p] * 5, *[c_int64] * 9, *[c_float] * 2, c_int),
}


class CpuOps:
    """Implements ops.Ops. Tensors are float32 and dense in memory; `threads` as torch.set_num_threads has it."""

    def __init__(self, library: Path, threads: int) -> None:
        self._threads = threads
        self._lib = ctypes.CDLL(str(library))
        for name, arguments in _SIGNATURES.items():
            getattr(self._lib, name).argtypes = arguments
        self._panel: int = self._lib.baton_panel_width()

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """See Ops: panels of output features, [panels, in_features, panel width], padded with zeros."""
        rows, features = weight.shape
        padded = torch.nn.functional.pad(weight, (0, 0, 0, -rows % self._panel))
        panels = padded.view(-1, self._panel, features).transpose(1, 2).contiguous()
        return PackedWeight(panels, rows)

    def embedding(self, token_ids: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        """See Ops."""
        return packed.data[token_ids // self._panel, :, token_ids % self._panel]

    def linear(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Ops."""
        if norm is not None:
            x = self.rms_norm(x, norm)
        n, features = x.shape
        y = torch.empty(n, packed.rows)
        self._lib.baton_linear(
            x.data_ptr(),
            x.stride(0),
            packed.data.data_ptr(),
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            y.data_ptr(),
            n,
            packed.rows,
            features,
            self._threads,
        )
        return y

    def gated_linear(
        self, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, norm: Norm | None = None
    ) -> torch.Tensor:
        """See Ops."""
        return self.silu_and_mul(self.linear(x, packed, bias, norm))

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See Ops."""
        y = torch.empty_like(x)
        n, size = x.shape
        self._lib.baton_rms_norm(x.data_ptr(), norm.weight.data_ptr(), norm.eps, y.data_ptr(), n, size, self._threads)
        return y

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        n, size = gate_up.shape[0], gate_up.shape[1] // 2
        y = torch.empty(n, size)
        self._lib.baton_silu_and_mul(gate_up.data_ptr(), y.data_ptr(), n, size, self._threads)
        return y

    def rope_and_cache(
        self,
        qkv: torch.Tensor,
        num_heads: int,
        cos_sin: torch.Tensor,
        positions: torch.Tensor,
        slot_mapping: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        qk_norm: tuple[torch.Tensor, torch.Tensor, float] | None,
    ) -> torch.Tensor:
        """See Ops. The queries are a view of qkv."""
        _, kv_heads, layers, _, block_size, dim = pool.shape
        query_norm, key_norm, eps = (None, None, 0.0) if qk_norm is None else qk_norm
        self._lib.baton_rope_and_cache(
            qkv.data_ptr(),
            cos_sin.data_ptr(),
            positions.data_ptr(),
            slot_mapping.data_ptr(),
            pool.data_ptr(),
            None if query_norm is None else query_norm.data_ptr(),
            None if key_norm is None else key_norm.data_ptr(),
            eps,
            qkv.shape[0],
            num_heads,
            kv_heads,
            dim,
            cos_sin.shape[1] // 2,
            layers,
            layer,
            block_size,
            self._threads,
        )
        return qkv.view(qkv.shape[0], -1, dim)[:, :num_heads]

    def paged_attention(
        self,
        query: torch.Tensor,
        pool: torch.Tensor,
        layer: int,
        query_start: torch.Tensor,
        seq_lens: torch.Tensor,
        block_tables: torch.Tensor,
        scale: float,
        planned: object | None = None,
        window: int = 0,
        soft_cap: float = 0.0,
    ) -> torch.Tensor:
        """See Ops."""
        _, kv_heads, layers, _, block_size, dim = pool.shape
        n, heads, _ = query.shape
        out = torch.empty(n, heads * dim)
        failed = self._lib.baton_paged_attention(
            query.data_ptr(),
            query.stride(0),
            pool.data_ptr(),
            out.data_ptr(),
            query_start.data_ptr(),
            seq_lens.data_ptr(),
            block_tables.data_ptr(),
            block_tables.shape[1],
            len(seq_lens),
            heads,
            kv_heads,
            dim,
            layers,
            layer,
            block_size,
            window,
            scale,
            soft_cap,
            self._threads,
        )
        if failed:
            raise MemoryError("no memory for the attention kernel's work list")
        return out

    def draw(
        self,
        logits: torch.Tensor,
        temperatures: torch.Tensor,
        top_k: torch.Tensor,
        top_p: torch.Tensor,
        min_p: torch.Tensor,
        uniforms: torch.Tensor,
    ) -> torch.Tensor:
        """See Ops."""
        n, size = logits.shape
        tokens = torch.empty(n, dtype=torch.int64)
        rows = (logits, temperatures, top_k, top_p, min_p, uniforms, tokens)
        if self._lib.baton_draw(*[tensor.data_ptr() for tensor in rows], n, size, self._threads):
            raise MemoryError("no memory to sort out the vocabulary")
        return tokens

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        n, size = logits.shape
        out = torch.empty(n)
        self._lib.baton_logsumexp(logits.data_ptr(), out.data_ptr(), n, size, self._threads)
        return out
