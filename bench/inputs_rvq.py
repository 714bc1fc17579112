"""The shapes at which residual vector quantization is measured, and random inputs of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from bench.inputs import GPU, RandomInputs
from sparsemoe.reference import rvq as reference
from sparsemoe.types import Encoded


@dataclass(frozen=True)
class Shape:
    name: str
    vectors: int
    dim: int
    codes: int
    stages: int
    dtype: torch.dtype = torch.float32  # of x; the codebooks are float32
    beam_vectors: int = 16384  # so many of them are for beam search

    def __str__(self) -> str:
        return (
            f"N={self.vectors} vectors ({self.beam_vectors} for beam search), D={self.dim}, "
            f"K={self.codes} codes, Q={self.stages} stages, "
            f"x in {str(self.dtype).removeprefix('torch.')}; random normal numbers, those of the "
            "codes of a stage 0.95 times those of the stage before"
        )

    @property
    def to_compile(self) -> Shape:
        return replace(self, vectors=min(self.vectors, 2048))


WIDE = Shape("N=65536 D=512 K=1024 Q=4", 65536, 512, 1024, 4)
DEEP = Shape("N=262144 D=128 K=1024 Q=8", 262144, 128, 1024, 8)
LONG = Shape("N=65536 D=1024 K=1024 Q=4", 65536, 1024, 1024, 4)
MANY = Shape("N=65536 D=256 K=16384 Q=1", 65536, 256, 16384, 1)
HALF = replace(WIDE, name=f"{WIDE.name} bf16", dtype=torch.bfloat16)
CPU = [Shape("N=8192 D=128 K=1024 Q=4", 8192, 128, 1024, 4, beam_vectors=512)]


class Inputs(RandomInputs):
    """Made on first use."""

    beam = 5

    @property
    def matmul_dtype(self) -> torch.dtype:
        """One pass in bfloat16 is the least that finds the nearest codes on a GPU."""
        return torch.bfloat16 if GPU else torch.float32

    @cached_property
    def x(self) -> Tensor:
        return self.random(self.shape.vectors, self.shape.dim)

    @cached_property
    def beam_x(self) -> Tensor:
        return self.x.detach()[: self.shape.beam_vectors]

    @cached_property
    def codebooks(self) -> Tensor:
        s = self.shape
        codes = self.random(s.stages, s.codes, s.dim, dtype=torch.float32).detach()
        scales = 0.95 ** torch.arange(s.stages, device=codes.device)
        return (codes * scales[:, None, None]).requires_grad_()

    @cached_property
    def encoded(self) -> Encoded:
        """As the reference has it."""
        with torch.no_grad():
            return reference.encode(self.x, self.codebooks)

    @cached_property
    def codes(self) -> Tensor:
        return self.encoded.codes

    @cached_property
    def long_codes(self) -> Tensor:
        return self.codes.long()

    @cached_property
    def state(self) -> tuple[Tensor, Tensor, Tensor]:
        """codebooks, cluster_size and embed_sum before a training step: all codes chosen alike."""
        s, codebooks = self.shape, self.codebooks.detach()
        cluster_size = codebooks.new_full((s.stages, s.codes), s.vectors / s.codes)
        return codebooks, cluster_size, codebooks * cluster_size[..., None]

    @cached_property
    def x_gradient(self) -> Tensor:
        """Of quantized, of about the size of the commitment loss's."""
        return self.gradient(self.x) * (10 / self.x.numel())

    @cached_property
    def y_gradient(self) -> Tensor:
        """Of what is decoded."""
        return self.gradient(self.encoded.quantized.float())

    def errors(self, codes: Tensor, x: Tensor) -> Tensor:
        """[Q'] the mean squared length of what each stage leaves of x."""
        return reference.given_codes(x, self.codebooks, codes).errors.mean(0)
