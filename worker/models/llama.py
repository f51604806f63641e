"""The Llama family: Llama, SmolLM, Mistral, Qwen2 and Qwen3 are one decoder with different data.

Touvron et al., 2023 (Llama); Jiang et al., 2023 (Mistral); Qwen2 and Qwen3 technical reports. Pre-norm transformer with
RMSNorm, rotary positions, grouped-query attention and a SwiGLU feed-forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from baton.kernels.ops import Norm, Ops
from baton.proto.checkpoint import is_headless
from baton.worker.batch import Batch
from baton.worker.layers.linear import Embedding, Linear, Matrix, parameter
from baton.worker.layers.rotary import cos_sin_table


@dataclass(frozen=True)
class LlamaConfig:
    """What config.json says about the shape of the model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Mapping[str, Any]
    """rope_type, rope_theta and the scaling's parameters."""
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    windows: tuple[int, ...]
    """Of each layer: tokens that one sees, itself included; 0: all before it."""
    soft_cap: float = 0.0
    """Attention scores s become soft_cap * tanh(s / soft_cap); 0: they stay."""

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """From config.json. Raises ValueError for what this file can't compute."""
        kind = config["model_type"]
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        rope = {"rope_theta": config.get("rope_theta", 10000.0), **(config.get("rope_scaling") or {})}
        rope |= config.get("rope_parameters") or {}
        head_dim = config.get("head_dim") or hidden // heads
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act '{config['hidden_act']}' is not supported, only silu")
        bias = bool(config.get("attention_bias", False))
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rotary_dim=int(head_dim * rope.get("partial_rotary_factor", 1.0)),
            rms_norm_eps=config["rms_norm_eps"],
            max_position_embeddings=config["max_position_embeddings"],
            rope=rope,
            qkv_bias=kind == "qwen2" or bias,
            output_bias=bias and kind != "qwen2",
            mlp_bias=bool(config.get("mlp_bias", False)),
            qk_norm=kind == "qwen3",
            # A checkpoint without a head, of an embedding model, is never asked for logits that mean anything.
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)) or is_headless(config),
            windows=_windows(config),
            soft_cap=config.get("attn_logit_softcapping") or 0.0,
        )


def _windows(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Mistral's window holds for all layers, Qwen's from layer max_window_layers on and only if it is switched on."""
    layers, window = config["num_hidden_layers"], config.get("sliding_window")
    if not window or not config.get("use_sliding_window", True) or window >= config["max_position_embeddings"]:
        return (0,) * layers
    kinds = config.get("layer_types")
    if kinds is None:
        first = config.get("max_window_layers", 0)
        kinds = ["full_attention"] * first + ["sliding_attention"] * (layers - first)
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)


class Attention(nn.Module):
    """Grouped-query attention over the paged KV cache."""

    def __init__(self, config: LlamaConfig, layer: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops, self.layer, self.config = ops, layer, config
        self.is_last = layer == config.num_layers - 1
        q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.qkv_proj = Linear(config.hidden_size, (q_size, kv_size, kv_size), config.qkv_bias, ops, dtype)
        self.o_proj = Linear(q_size, (config.hidden_size,), config.output_bias, ops, dtype)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype)

    def forward(
        self, x: torch.Tensor, norm: Norm, batch: Batch, cos_sin: torch.Tensor, pool: torch.Tensor
    ) -> torch.Tensor:
        """x + attention(norm(x)), [num_tokens, hidden]; writes this layer's KV of the tokens into the pool.

        In the last layer only of the tokens that are wanted: there the others' KV is all that is needed of them.
        """
        norms = (self.q_norm.weight, self.k_norm.weight, self.q_norm.eps) if self.config.qk_norm else None
        query = self.ops.rope_and_cache(
            self.qkv_proj(x, norm),
            self.config.num_heads,
            cos_sin,
            batch.positions,
            batch.slot_mapping,
            pool,
            self.layer,
            norms,
        )
        attended = self.ops.paged_attention(
            query,
            pool,
            self.layer,
            batch.query_start,
            batch.seq_lens,
            batch.block_tables,
            self.config.head_dim**-0.5,
            batch.planned,
            self.config.windows[self.layer],
            self.config.soft_cap,
        )
        if self.is_last and batch.logits_indices is not None:
            attended = attended[batch.logits_indices]
            # Where x lies: elsewhere it would take a piece of what the feed-forward needs whole.
            x = x[: len(attended)].copy_(x[batch.logits_indices])
        return self.o_proj(attended, residual=x)


class MLP(nn.Module):
    """SwiGLU (Shazeer, 2020)."""

    def __init__(self, config: LlamaConfig, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        inner = config.intermediate_size
        self.gate_up_proj = Linear(config.hidden_size, (inner, inner), config.mlp_bias, ops, dtype)
        self.down_proj = Linear(inner, (config.hidden_size,), config.mlp_bias, ops, dtype)

    def forward(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """x + feed_forward(norm(x)), [num_tokens, hidden]."""
        return self.down_proj(self.gate_up_proj.gated(x, norm), residual=x)


class RMSNorm(nn.Module):
    """The weight and epsilon of a norm; the operation is in Ops."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = parameter(size, dtype=dtype)
        self.eps = eps

    @property
    def norm(self) -> Norm:
        """As the operations take it."""
        return Norm(self.weight, self.eps)


class Layer(nn.Module):
    """One decoder layer: both parts read the residual stream through a norm and add to it."""

    def __init__(self, config: LlamaConfig, layer: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.self_attn = Attention(config, layer, ops, dtype)
        self.mlp = MLP(config, ops, dtype)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def attend(self, x: torch.Tensor, batch: Batch, cos_sin: torch.Tensor, pool: torch.Tensor) -> torch.Tensor:
        """[num_tokens, hidden] -> the same; of the last layer [num_samples, hidden]."""
        return self.self_attn(x, self.input_layernorm.norm, batch, cos_sin, pool)

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, hidden]."""
        return self.mlp(x, self.post_attention_layernorm.norm)


class Decoder(nn.Module):
    """Embedding, layers and the last norm: the checkpoint's `model.`"""

    def __init__(self, config: LlamaConfig, max_model_len: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, ops, dtype)
        self.layers = nn.ModuleList(Layer(config, index, ops, dtype) for index in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.cos_sin = cos_sin_table(config.rope, config.rotary_dim, max_model_len, config.max_position_embeddings)

    def forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        """See LlamaForCausalLM.forward."""
        x = self.embed_tokens(batch.token_ids)
        for layer in self.layers:
            assert isinstance(layer, Layer)
            x = layer.attend(x, batch, self.cos_sin, pool)
            x = layer.feed_forward(x)
        return x


class LlamaForCausalLM(nn.Module):
    """Tokens and a KV pool in, hidden states and logits out; knows nothing of requests."""

    fused: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    }
    """Our parameter -> the checkpoint's, whose rows it holds one after the other."""
    base_prefix: ClassVar[str] = "model."
    """What names lack in a checkpoint that was saved without the head."""

    def __init__(self, config: LlamaConfig, max_model_len: int, ops: Ops, dtype: torch.dtype) -> None:
        super().__init__()
        self.ops = ops
        self.model = Decoder(config, max_model_len, ops, dtype)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, (config.vocab_size,), False, ops, dtype)
        self.tied = config.tie_word_embeddings

    def pack(self) -> None:
        """To be called once the parameters are filled, before the first forward."""
        for module in self.modules():
            if isinstance(module, Matrix):
                module.pack()

    def forward(self, batch: Batch, pool: torch.Tensor) -> torch.Tensor:
        """Hidden states, before the last norm, of the tokens in batch.logits_indices: [num_samples, hidden].

        pool: [num_blocks, num_kv_heads, num_layers, 2, block_size, head_dim], written for every token of the batch.
        """
        return self.model(batch, pool)

    def normed(self, hidden: torch.Tensor) -> torch.Tensor:
        """[n, hidden] -> [n, hidden] after the last norm: what embeddings are made of."""
        return self.ops.rms_norm(hidden, self.model.norm.norm)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[num_samples, hidden] -> [num_samples, vocab_size] of the model's dtype."""
        norm = self.model.norm.norm
        return self.model.embed_tokens.logits(hidden, norm) if self.tied else self.lm_head(hidden, norm)
