"""Rotary position embedding (arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Rotary(nn.Module):
    """Turns pairs of channels by an angle that grows with the position.

    Args:
        head_dim: channels of a head, even.
        context: positions it knows.
        theta: the longest wavelength is some 2 pi theta positions.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, context: int, theta: float = 10000.0) -> None:
        super().__init__()
        frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.outer(torch.arange(context, dtype=torch.float64), frequency)
        self.register_buffer("cos", angle.cos().float(), persistent=False)  # [context, D/2]
        self.register_buffer("sin", angle.sin().float(), persistent=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """x [B, S, heads, D] at positions start .. start + S - 1."""
        end = start + x.shape[1]
        cos = self.cos[start:end, None].to(x.dtype)
        sin = self.sin[start:end, None].to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
