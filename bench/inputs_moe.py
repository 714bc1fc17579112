"""The shapes at which the mixture of experts is measured, and random inputs of those shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

import torch
from torch import Tensor

from bench import plain_moe, timing
from bench.inputs import RandomInputs
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
    skewed: bool = False  # a tenth of the experts take half of the rows

    def __str__(self) -> str:
        return (
            f"T={self.tokens} tokens, H={self.hidden}, F={self.width}, E={self.experts} experts, "
            f"k={self.top_k}, {str(self.dtype).removeprefix('torch.')}"
            + ", a tenth of the experts take half of the rows"
            * self.skewed
        )

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def to_compile(self) -> Shape:
        """What fills the compilers' caches as well: their kernels are for widths, not for sizes.
        At most 2**29 weights, since several processes compile side by side on one GPU."""
        experts = self.experts
        while experts > self.top_k and 3 * experts * self.hidden * self.width > 2**29:
            experts //= 2
        return replace(self, tokens=min(self.tokens, 2048), experts=experts)

    @property
    def groups(self) -> int:
        """Expert choice is by groups of 4096 tokens."""
        return max(1, self.tokens // 4096)


QWEN3 = Shape("Qwen3-30B-A3B", 32768, 2048, 768, 128, 8)
OLMOE = Shape("OLMoE-1B-7B", 32768, 2048, 1024, 64, 8)
SKEWED = [replace(shape, name=f"{shape.name} skewed", skewed=True) for shape in (QWEN3, OLMOE)]
OTHERS = [
    Shape("Mixtral-8x7B", 16384, 4096, 14336, 8, 2),
    Shape("DeepSeek-V3, 64 of its experts", 16384, 7168, 2048, 64, 8),
    Shape("gpt-oss-120b", 16384, 2880, 2880, 128, 4),
]
DECODE = [
    replace(QWEN3, name=f"Qwen3-30B-A3B decode {tokens}", tokens=tokens)
    for tokens in (1, 2, 4, 8, 16, 32, 64, 128, 256)
]
CPU = [
    Shape("small fp32", 4096, 512, 512, 32, 4, torch.float32),
    Shape("small bf16", 4096, 512, 512, 32, 4),
]


class Inputs(RandomInputs):
    """Made on first use."""

    def __init__(self, shape: Shape) -> None:
        super().__init__(shape)
        self.tokens, self.top_k, self.num_experts = shape.tokens, shape.top_k, shape.experts
        self.groups = shape.groups
        self.group_capacity = math.ceil(shape.pairs / shape.experts / shape.groups)
        self.capacity = math.ceil(shape.pairs / shape.experts)

    @cached_property
    def x(self) -> Tensor:
        return self.random(self.tokens, self.shape.hidden)

    @cached_property
    def router(self) -> Tensor:
        hidden = self.shape.hidden
        router = self.random(self.num_experts, hidden, scale=hidden**-0.5, dtype=torch.bfloat16)
        return router.detach().float().requires_grad_()

    @cached_property
    def low_router(self) -> Tensor:
        return self.router.detach().bfloat16().requires_grad_()

    @cached_property
    def gate_up_proj(self) -> Tensor:
        hidden, width = self.shape.hidden, self.shape.width
        return self.random(self.num_experts, 2 * width, hidden, scale=hidden**-0.5)

    @cached_property
    def interleaved_proj(self) -> Tensor:
        """[E, F, 2, H]: gate_up_proj with each row of the gate before the row that it gates."""
        pairs = self.gate_up_proj.detach().unflatten(1, (2, -1)).transpose(1, 2)
        return pairs.contiguous().requires_grad_()

    @cached_property
    def down_proj(self) -> Tensor:
        hidden, width = self.shape.hidden, self.shape.width
        return self.random(self.num_experts, hidden, width, scale=width**-0.5)

    @cached_property
    def gate_up_by_column(self) -> Tensor:
        return self.gate_up_proj.detach().mT.contiguous().mT.requires_grad_()

    @cached_property
    def down_by_column(self) -> Tensor:
        return self.down_proj.detach().mT.contiguous().mT.requires_grad_()

    @cached_property
    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """The weights of eight layers, equal but each in memory of its own."""
        first = self.gate_up_proj.detach(), self.down_proj.detach()
        return [first, *((first[0].clone(), first[1].clone()) for _ in range(7))]

    @cached_property
    def logits(self) -> Tensor:
        logits = self.random(self.tokens, self.num_experts, dtype=torch.float32)
        if self.shape.skewed:
            hot = round(self.num_experts / 10)
            half = self.top_k / 2  # of a token's choices, among the hot and among the others

            def least(experts: int) -> float:
                """The least of the chosen logits where `half` of so many are chosen."""
                return NormalDist().inv_cdf(1 - half / experts)

            columns = torch.arange(hot, device=timing.DEVICE) * self.num_experts // hot
            logits.detach()[:, columns] += least(self.num_experts - hot) - least(hot)
        return logits

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
    def touched(self) -> int:
        """Experts that take a row."""
        return int((self.counts > 0).sum())

    @cached_property
    def long_plan(self) -> Plan:
        """The same plan as plain PyTorch makes it, with int64 indices."""
        return plain_moe.plan(self.experts, self.num_experts)

    @cached_property
    def pair_tokens(self) -> Tensor:
        pairs = torch.arange(self.shape.pairs, dtype=torch.int32, device=timing.DEVICE)
        return pairs // self.top_k

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
