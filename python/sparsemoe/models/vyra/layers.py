"""Layers of the codec: causal convolutions, and transformer blocks that may look at a memory.

B sequences, S positions, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemoe.models.vyra.codec_config import CodecConfig
from sparsemoe.nn.rotary import Rotary


class CausalConv(nn.Module):
    """A convolution of kernel 3 along the sequence, as one matrix product, channels last.

    Output i sees the inputs i-2 .. i with stride 1, and 2i-1 .. 2i+1 with stride 2: none past its
    own pair, so that a chain of them ends at the patch's last byte.
    """

    KERNEL = 3

    def __init__(self, in_size: int, out_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.proj = nn.Linear(self.KERNEL * in_size, out_size)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, in_size] -> [B, S / stride, out_size]."""
        length, last = x.shape[1], x.shape[1] - self.stride + 1
        x = F.pad(x, (0, 0, self.KERNEL - self.stride, 0))
        taps = [x[:, k : k + last : self.stride] for k in range(self.KERNEL)]
        return self.proj(torch.cat(taps, dim=-1))[:, : length // self.stride]


class Attention(nn.Module):
    """Causal attention of a sequence to itself, or to a memory of equal length: position n sees
    the memory's positions up to n."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = width // self.num_heads
        self.eps = config.norm_eps
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.rotary = Rotary(self.head_dim, config.patches, config.rope_theta)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        """x and memory [B, S, C] -> [B, S, C]; for self-attention they are the same."""
        heads = (*x.shape[:2], -1, self.head_dim)
        q = self.q_proj(x).view(heads)
        k, v = self.kv_proj(memory).view(heads).chunk(2, dim=2)
        q, k = (F.rms_norm(t, (self.head_dim,), eps=self.eps) for t in (q, k))
        q, k = self.rotary(q), self.rotary(k)
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True
        )
        return self.o_proj(y.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x))."""

    def __init__(self, size: int, intermediate_size: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(size, 2 * intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Self-attention, with ``cross`` also attention to a memory, and a feed-forward: each adds to
    the residual stream what it makes of its normalised values."""

    def __init__(self, config: CodecConfig, cross: bool) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.attention_norm = nn.RMSNorm(size, eps=eps)
        self.attention = Attention(config)
        self.cross_norm = nn.RMSNorm(size, eps=eps) if cross else None
        self.cross_attention = Attention(config) if cross else None
        self.ffn_norm = nn.RMSNorm(size, eps=eps)
        self.ffn = FeedForward(size, config.intermediate_size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """x, and the memory with ``cross``, [B, S, C] -> [B, S, C]."""
        y = self.attention_norm(x)
        x = x + self.dropout(self.attention(y, y))
        if self.cross_attention is not None:
            x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory))
        return x + self.dropout(self.ffn(self.ffn_norm(x)))
