"""How the codes of a quantizer are used."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class CodeUsage(NamedTuple):
    """How often each code was chosen, in tensors on their device: nothing waits until one is read.

    Perplexity and entropy depend on how many vectors were counted. To compare runs, count a fixed
    held-out set: add the counts of its batches.
    """

    counts: Tensor  # [..., K] int64, a row a stage

    def share(self) -> Tensor:
        """[..., K] the fraction of a stage's vectors that chose each code; 0 without vectors."""
        return self.counts / self.counts.sum(-1, keepdim=True).clamp(min=1)

    def entropy_bits(self) -> Tensor:
        """[...] H = -sum p log2 p of each stage, in bits a code: log2(K) at even use."""
        return torch.special.entr(self.share()).sum(-1) / math.log(2)

    def perplexity(self) -> Tensor:
        """[...] 2^H of each stage: K at even use, 1 when one code takes all."""
        return self.entropy_bits().exp2()

    def used_share(self) -> Tensor:
        """[...] the fraction of each stage's codes that were chosen at all."""
        return (self.counts > 0).float().mean(-1)


def code_usage(codes: Tensor, codebook_size: int) -> CodeUsage:
    """Count codes [..., Q], -1 taking no part: CodeUsage with counts [Q, codebook_size].

    Example:
        >>> counts = sum(code_usage(rvq.encode(x), 1024).counts for x in held_out)
        >>> bits_per_vector = CodeUsage(counts).entropy_bits().sum()
    """
    n_stages = codes.shape[-1]
    rows = codes.reshape(-1, n_stages).long()
    first = torch.arange(n_stages, device=codes.device) * codebook_size
    nowhere = n_stages * codebook_size
    places = torch.where(rows >= 0, rows + first, nowhere).flatten()
    counts = torch.zeros(nowhere + 1, dtype=torch.int64, device=codes.device)
    counts.scatter_add_(0, places, torch.ones_like(places))
    return CodeUsage(counts[:-1].view(n_stages, codebook_size))
