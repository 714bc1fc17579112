"""The model: bytes in, logits over the next byte out.

Pre-norm transformer: RMSNorm, rotary positions (arXiv 2104.09864), grouped-query attention
(arXiv 2305.13245), SwiGLU feed-forward (arXiv 2002.05202), dense or as a mixture of experts,
and one matrix for both the embedding and the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemoe.models.moe_lm.config import NUM_BYTES, VOCAB_SIZE, MoELMConfig
from sparsemoe.nn import MoE
from sparsemoe.nn.rotary import Rotary

Aux = dict[str, Tensor]


class KVCache:
    """Keys and values of the positions already seen, so that a step costs one position.

    Holds up to ``config.context`` positions of ``batch_size`` sequences. ``length`` is the
    number held; :meth:`MoELM.forward` advances it.
    """

    def __init__(
        self,
        config: MoELMConfig,
        batch_size: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        shape = (batch_size, config.num_kv_heads, config.context, config.head_dim)
        self.length = 0
        self.capacity = config.context
        self.keys = [
            torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.num_layers)
        ]
        self.values = [torch.zeros_like(keys) for keys in self.keys]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Stores new keys and values [B, kv_heads, S, D]; returns those of all positions."""
        end = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : end] = keys
        self.values[layer][:, :, self.length : end] = values
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share a key and value head."""

    def __init__(self, config: MoELMConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.head_dim = config.head_dim
        heads = self.num_heads + 2 * self.num_kv_heads
        self.qkv_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, config.hidden_size, bias=False)
        self.qk_norm, self.eps = config.qk_norm, config.norm_eps
        self.rotary = Rotary(self.head_dim, config.context, config.rope_theta)

    def forward(self, x: Tensor, cache: KVCache | None, layer: int) -> Tensor:
        batch, length, _ = x.shape
        start = 0 if cache is None else cache.length
        qkv = self.qkv_proj(x).view(batch, length, -1, self.head_dim)
        qk, v = qkv.split((self.num_heads + self.num_kv_heads, self.num_kv_heads), dim=2)
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.head_dim,), eps=self.eps)
        qk = self.rotary(qk, start).transpose(1, 2)
        q, k = qk.split((self.num_heads, self.num_kv_heads), dim=1)  # [B, heads, S, D]
        v = v.transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)
        mask = None
        if start > 0 and length > 1:  # query i sees the cached positions and those up to its own
            mask = q.new_ones(length, start + length, dtype=torch.bool).tril(start)
        y = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=start == 0 and length > 1,
            enable_gqa=self.num_heads != self.num_kv_heads,
        )
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, -1))


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: MoELMConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.dense_size, bias=False)
        self.down_proj = nn.Linear(config.dense_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Attention, then a feed-forward, each on the normalised residual stream."""

    def __init__(self, config: MoELMConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.attention_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = Attention(config)
        self.ffn_norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.is_moe = config.is_moe(layer)
        self.ffn = make_moe(config) if self.is_moe else FeedForward(config)

    def forward(self, x: Tensor, cache: KVCache | None) -> tuple[Tensor, tuple | None]:
        """x [B, S, H] -> the same shape, and the routing of a mixture of experts."""
        x = x + self.attention(self.attention_norm(x), cache, self.layer)
        if not self.is_moe:
            return x + self.ffn(self.ffn_norm(x)), None
        y, routing = self.ffn(self.ffn_norm(x))
        return x + y, routing


def make_moe(config: MoELMConfig) -> MoE:
    """The mixture of experts that the config describes."""
    scores = {"scoring": config.scoring, "renormalize": config.renormalize, "scale": config.scale}
    options: dict[str, dict[str, Any]] = {
        "topk": {**scores, "expert_bias": config.expert_bias_rate > 0},
        "sinkhorn": {
            **scores,
            "n_iters": config.sinkhorn_iters,
            "temperature": config.sinkhorn_temperature,
            "per_sequence": config.sinkhorn_per_sequence,
            "inference": config.sinkhorn_inference,
            "weights_from": config.sinkhorn_weights,
        },
        "expert_choice": {"causal": True},
    }
    return MoE(
        config.hidden_size,
        config.expert_size,
        config.num_experts,
        config.top_k,
        router=config.router,
        capacity_factor=config.capacity_factor,
        drop_policy=config.drop_policy,
        num_shared_experts=config.num_shared_experts,
        jitter=config.jitter,
        **options[config.router],
    )


class MoELM(nn.Module):
    """The language model.

    ``model(tokens)`` gives logits, ``model(tokens, targets)`` the training loss.
    """

    def __init__(self, config: MoELMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(VOCAB_SIZE, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in; matrices that write to the residual stream
        are smaller by the square root of their number, so that its variance stays near one."""
        writers = math.sqrt(2 * self.config.num_layers)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue  # gains of norms, biases
            std = weight.shape[-1] ** -0.5
            if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                std /= writers
            if name == "embedding.weight" or "router" in name:
                std = 0.02  # small logits: no byte and no expert is preferred at first
            nn.init.normal_(weight, std=std)

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, *, cache: KVCache | None = None
    ) -> tuple[Tensor, Aux]:
        """Logits, or the loss where targets are given.

        tokens   [B, S] integers 0..256 (256 is START); S plus what the cache holds is at most
                 config.context, else ValueError
        targets  [B, S] integers 0..255: the byte after each token
        cache    keys and values of earlier positions; advanced by S

        Returns logits [B, S, 256] or the scalar loss (mean cross-entropy in nats plus the
        weighted router losses), and a dict of device tensors: ``cross_entropy`` (with
        targets), and for a mixture of experts ``load_balance_loss`` and ``router_z_loss``
        (means over layers), ``counts`` [moe_layers, E] int32 (pairs sent to each expert) and
        ``num_kept`` (pairs not dropped).
        """
        start = 0 if cache is None else cache.length
        if start + tokens.shape[1] > self.config.context:
            raise ValueError(
                f"tokens reach position {start + tokens.shape[1]}; "
                f"the model's context is {self.config.context}"
            )
        x = self.embedding(tokens)  # [B, S, H]
        routings = []
        for block in self.blocks:
            x, routing = block(x, cache)
            if routing is not None:
                routings.append(routing)
        if cache is not None:
            cache.length += tokens.shape[1]
        logits = F.linear(self.norm(x), self.embedding.weight[:NUM_BYTES])
        aux = gather_routing(routings)
        if targets is None:
            return logits, aux
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        aux["cross_entropy"] = loss.detach()
        if routings:
            loss = loss + self.config.load_balance_weight * aux["load_balance_loss"]
            loss = loss + self.config.router_z_weight * aux["router_z_loss"]
        return loss, aux

    def update_expert_bias(self, counts: Tensor) -> None:
        """Loss-free balancing, once a step: counts [moe_layers, E] of the step's batch."""
        layers = [block.ffn for block in self.blocks if block.is_moe]
        for moe, layer_counts in zip(layers, counts, strict=True):
            moe.update_bias(layer_counts, self.config.expert_bias_rate)


def gather_routing(routings: list) -> Aux:
    """One dict from the layers' routings; empty where no layer routes."""
    if not routings:
        return {}
    return {
        "load_balance_loss": torch.stack([r.load_balance_loss for r in routings]).mean(),
        "router_z_loss": torch.stack([r.router_z_loss for r in routings]).mean(),
        "counts": torch.stack([r.counts for r in routings]),
        "num_kept": torch.stack([r.num_kept for r in routings]).sum(),
    }
