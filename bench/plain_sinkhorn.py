"""Sinkhorn balancing in plain PyTorch, as people write it."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def by_logarithms(logits: Tensor, n_iters: int) -> Tensor:
    x = logits.float()
    n_tokens, n_experts = x.shape[-2:]
    share = math.log(n_tokens / n_experts)
    log_u = -x.logsumexp(-1, keepdim=True)
    log_v = torch.zeros_like(x[..., :1, :])
    for _ in range(n_iters):
        log_v = share - (x + log_u).logsumexp(-2, keepdim=True)
        log_u = -(x + log_v).logsumexp(-1, keepdim=True)
    return (x + log_u + log_v).exp()


def by_products(logits: Tensor, n_iters: int) -> Tensor:
    """One exponential an element, and products with the matrix: while nothing underflows."""
    k = (logits.float() - logits.float().amax(-1, keepdim=True)).exp()
    n_tokens, n_experts = k.shape[-2:]
    v = torch.ones_like(k[..., 0, :, None])
    u = 1 / (k @ v)
    for _ in range(n_iters):
        v = n_tokens / n_experts / (k.mT @ u)
        u = 1 / (k @ v)
    return k * u * v.mT


def until_still(logits: Tensor, n_iters: int) -> Tensor:
    """Megatron-LM's rule: exponentials as they are, until the row scalings change by 1e-4 or less.
    Each look waits for the device. Its iterations are its own, and it ends on the columns."""
    k = logits.float().exp()
    n_tokens, n_experts = k.shape[-2:]
    rows, columns = torch.ones_like(k[..., 0]), torch.ones_like(k[..., 0, :])
    change = torch.full((), 1e9, device=k.device)
    while change > 1e-4:
        before = rows
        rows = 1 / n_tokens / ((k * columns[..., None, :]).sum(-1) + 1e-8)
        columns = 1 / n_experts / ((k * rows[..., None]).sum(-2) + 1e-8)
        change = (before - rows).abs().mean()
    return n_tokens * k * rows[..., None] * columns[..., None, :]
