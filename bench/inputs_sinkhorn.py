"""The shapes at which Sinkhorn balancing is measured, and random inputs of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench import timing
from bench.inputs import RandomInputs


@dataclass(frozen=True)
class Shape:
    name: str
    problems: int
    tokens: int
    experts: int
    iterations: int = 8
    dtype: torch.dtype = torch.float32

    def __str__(self) -> str:
        return (
            f"{self.problems} of T={self.tokens} tokens, E={self.experts} experts,"
            f" {self.iterations} iterations, {str(self.dtype).removeprefix('torch.')};"
            " random normal numbers"
        )

    @property
    def to_compile(self) -> Shape:
        return replace(self, problems=min(self.problems, 64), tokens=min(self.tokens, 2048))


def one(tokens: int, experts: int) -> Shape:
    return Shape(f"T={tokens} E={experts}", 1, tokens, experts)


def many(problems: int, size: int) -> Shape:
    return Shape(f"{problems} of {size}x{size}", problems, size, size, 20)


ROUTER = one(32768, 64)
HALF = replace(ROUTER, name=f"{ROUTER.name} bf16", dtype=torch.bfloat16)
SEQUENCES = Shape("8 of T=4096 E=64", 8, 4096, 64)
GPU = [
    ROUTER,
    one(8192, 64),
    one(32768, 256),
    one(131072, 64),
    HALF,
    SEQUENCES,
    many(65536, 4),
    many(16384, 16),
    many(4096, 64),
]
CPU = [one(4096, 64), one(32768, 64), many(65536, 4)]


class Inputs(RandomInputs):
    """Made on first use."""

    @cached_property
    def logits(self) -> Tensor:
        s = self.shape
        leading = (s.problems,) if s.problems > 1 else ()
        return self.random(*leading, s.tokens, s.experts)

    @cached_property
    def iterations(self) -> int:
        return self.shape.iterations

    @cached_property
    def copy_ms(self) -> float:
        """Of copying the logits."""
        logits = self.logits.detach()
        target = torch.empty_like(logits)
        return timing.milliseconds(lambda: target.copy_(logits))
