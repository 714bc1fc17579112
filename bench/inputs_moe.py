"""The shapes at which the mixture of experts is measured, and random inputs of those shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from bench import plain_moe, timing
from sparsemoe.reference import moe as reference
from sparsemoe.types import Gate, Plan


@dataclass(frozen=True)
class Shape:
    name: str
    tokens: int
    hidden: int
    width: int
    experts: int
    top_k: int
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return (
            f"T={self.tokens} tokens, H={self.hidden}, F={self.width}, E={self.experts} experts, "
            f"k={self.top_k}, {str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def groups(self) -> int:
        """Expert choice is by groups of 4096 tokens."""
        return max(1, self.tokens // 4096)


GPU_SHAPES = [
    Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8),
    Shape("OLMoE-1B-7B", 32768, 2048, 1024, 64, 8),
    Shape("Qwen3-30B-A3B decode", 64, 2048, 768, 128, 8),
]
CPU_SHAPES = [
    Shape("small fp32", 4096, 512, 512, 32, 4, torch.float32),
    Shape("small bf16", 4096, 512, 512, 32, 4),
]
SHAPES = GPU_SHAPES if timing.DEVICE.type == "cuda" else CPU_SHAPES


class Inputs:
    """Made on first use. Those that may want a gradient are leaves."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.tokens, self.top_k, self.num_experts = shape.tokens, shape.top_k, shape.experts
        self.groups = shape.groups
        self.group_capacity = math.ceil(shape.pairs / shape.experts / shape.groups)
        self.capacity = math.ceil(shape.pairs / shape.experts)
        self._generator = torch.Generator(timing.DEVICE).manual_seed(0)
        self._gradients: dict[Any, Tensor] = {}

    def random(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(
            size,
            generator=self._generator,
            device=timing.DEVICE,
            dtype=dtype or self.shape.dtype,
        )
        return values.mul_(scale).requires_grad_()

    def gradient(self, y: Tensor) -> Tensor:
        """A random gradient of y, the same on every call."""
        if y.dim() == 0:
            return torch.ones_like(y)
        if y.shape not in self._gradients:
            self._gradients[y.shape] = self.random(*y.shape, dtype=y.dtype).detach()
        return self._gradients[y.shape]

    @cached_property
    def x(self) -> Tensor:
        return self.random(self.tokens, self.shape.hidden)

    @cached_property
    def router(self) -> Tensor:
        hidden = self.shape.hidden
        return self.random(self.num_experts, hidden, scale=hidden**-0.5, dtype=torch.float32)

    @cached_property
    def gate_up_proj(self) -> Tensor:
        hidden, width = self.shape.hidden, self.shape.width
        return self.random(self.num_experts, 2 * width, hidden, scale=hidden**-0.5)

    @cached_property
    def down_proj(self) -> Tensor:
        hidden, width = self.shape.hidden, self.shape.width
        return self.random(self.num_experts, hidden, width, scale=width**-0.5)

    @cached_property
    def logits(self) -> Tensor:
        return self.random(self.tokens, self.num_experts, dtype=torch.float32)

    @cached_property
    def _gate(self) -> Gate:
        return reference.gate(self.logits.detach(), self.top_k, renormalize=True)

    @cached_property
    def experts(self) -> Tensor:
        return self._gate.experts

    @cached_property
    def weights(self) -> Tensor:
        return self._gate.weights.detach().requires_grad_()

    @cached_property
    def plan(self) -> Plan:
        return reference.plan(self.experts, self.num_experts)

    @cached_property
    def counts(self) -> Tensor:
        return self.plan.counts

    @cached_property
    def long_plan(self) -> Plan:
        """The same plan as plain PyTorch makes it, with int64 indices."""
        return plain_moe.plan(self.experts, self.num_experts)

    @cached_property
    def pair_rows(self) -> Tensor:
        """The row of each pair, all first choices first, as moe-ops wants it."""
        return self.plan.token_rows.T.flatten()

    @cached_property
    def rows(self) -> Tensor:
        return self.random(self.shape.pairs, self.shape.hidden)

    @property
    def rows_gradient(self) -> Tensor:
        return self.gradient(self.rows)

    @property
    def y_gradient(self) -> Tensor:
        return self.gradient(self.x)
