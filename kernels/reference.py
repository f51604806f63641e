"""Plain torch versions of every operation: the definition that the kernels are tested against, and the fallback."""

import torch
from torch.nn import functional

from baton.kernels.ops import Norm, PackedWeight


class TorchOps:
    """Implements ops.Ops for any device and dtype."""

    def pack(self, weight: torch.Tensor) -> PackedWeight:
        """See Ops: as it is."""
        return PackedWeight(weight, len(weight))

    def linear(
        self,
        x: torch.Tensor,
        packed: PackedWeight,
        bias: torch.Tensor | None,
        norm: Norm | None = None,
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See Ops."""
        y = functional.linear(x if norm is None else self.rms_norm(x, norm), packed.data, bias)
        return y if residual is None else residual + y

    def gated_linear(
        self, x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None, norm: Norm | None = None
    ) -> torch.Tensor:
        """See Ops."""
        return self.silu_and_mul(self.linear(x, packed, bias, norm))

    def embedding(self, token_ids: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        """See Ops."""
        return functional.embedding(token_ids, packed.data)

    def rms_norm(self, x: torch.Tensor, norm: Norm) -> torch.Tensor:
        """See Ops."""
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + norm.eps)
        return norm.weight * normed.to(x.dtype)

    def silu_and_mul(self, gate_up: torch.Tensor) -> torch.Tensor:
        """See Ops."""
        gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

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
        """See Ops."""
        num_kv_heads, block_size, head_dim = pool.shape[1], pool.shape[4], pool.shape[5]
        heads = qkv.view(qkv.shape[0], -1, head_dim)
        query, key, value = heads.split([num_heads, num_kv_heads, num_kv_heads], dim=1)
        if qk_norm is not None:
            query_weight, key_weight, eps = qk_norm
            query, key = self.rms_norm(query, Norm(query_weight, eps)), self.rms_norm(key, Norm(key_weight, eps))
        table = cos_sin[positions.long()][:, None, :]  # [n, 1, rotary_dim]
        query, key = _rotate(query, table), _rotate(key, table)
        blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
        pool[blocks, :, layer, 0, offsets] = key
        pool[blocks, :, layer, 1, offsets] = value
        return query

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
        """See Ops. Loops over sequences, not tokens."""
        block_size = pool.shape[4]
        starts = query_start.tolist()
        outputs = []
        for index, seq_len in enumerate(seq_lens.tolist()):
            blocks = block_tables[index, : -(-seq_len // block_size)].long()
            # [blocks, kv_heads, 2, block_size, head_dim] -> [2, kv_heads, seq_len, head_dim]
            cached = pool[blocks, :, layer].permute(2, 1, 0, 3, 4).flatten(2, 3)[:, :, :seq_len]
            rows = query[starts[index] : starts[index + 1]].transpose(0, 1)  # [heads, rows, head_dim]
            outputs.append(_causal_attention(rows, cached[0], cached[1], scale, window, soft_cap))
        return torch.cat(outputs) if outputs else query.flatten(1)

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
        scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperatures[:, None]
        ranked = scaled.sort(dim=-1, descending=True).values
        count = torch.where(top_k > 0, top_k, scaled.shape[1]).clamp(max=scaled.shape[1])
        threshold = torch.maximum(ranked.gather(1, count[:, None] - 1), min_p.log()[:, None])
        weights = ranked.exp().masked_fill(ranked < threshold, 0).double()
        up_to = weights.cumsum(dim=-1)
        reached = (up_to < top_p[:, None] * up_to[:, -1:]).sum(dim=-1, keepdim=True)
        nucleus = ranked.gather(1, reached.clamp(max=scaled.shape[1] - 1))
        threshold = torch.where(top_p[:, None] < 1, torch.maximum(threshold, nucleus), threshold)
        cumulative = scaled.masked_fill(scaled < threshold, -torch.inf).exp().cumsum(dim=-1, dtype=torch.float64)
        targets = uniforms[:, None] * cumulative[:, -1:]
        return torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=scaled.shape[1] - 1)

    def logsumexp(self, logits: torch.Tensor) -> torch.Tensor:
        """See Ops. torch's own orders the sum by the number of rows, so each row is computed by itself."""
        return torch.stack([row.logsumexp(dim=0) for row in logits])


def copy_blocks(source: torch.Tensor, target: torch.Tensor, jobs: torch.Tensor) -> None:
    """target[jobs[i, 1]] = source[jobs[i, 0]]: whole blocks along the first axis; jobs int64 [n, 2]."""
    target[jobs[:, 1]] = source[jobs[:, 0]]


def _rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """x [n, heads, head_dim], table float32 [n, 1, rotary_dim]."""
    cos, sin = table.to(x.dtype).chunk(2, dim=-1)
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def _causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: int, soft_cap: float
) -> torch.Tensor:
    """query [heads, rows, d], key and value [kv_heads, len, d]; the rows are the last of len -> [rows, heads * d]."""
    rows, length = query.shape[1], key.shape[1]
    visible = torch.ones(rows, length, dtype=torch.bool, device=query.device).tril(length - rows)
    if window:
        visible = visible.triu(length - rows - window + 1)
    if soft_cap:
        key, value = (x.repeat_interleave(len(query) // len(x), dim=0) for x in (key, value))
        scores = soft_cap * torch.tanh((query @ key.transpose(1, 2)).float() * (scale / soft_cap))
        output = scores.masked_fill(~visible, -torch.inf).softmax(dim=-1).to(value.dtype) @ value
        return output.transpose(0, 1).flatten(1)
    output = functional.scaled_dot_product_attention(
        query[None], key[None], value[None], attn_mask=visible, scale=scale, enable_gqa=True
    )
    return output[0].transpose(0, 1).flatten(1)
