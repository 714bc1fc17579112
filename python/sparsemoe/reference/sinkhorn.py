"""Sinkhorn balancing in plain PyTorch, in the log domain; exact in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Balanced


def sinkhorn(
    logits: Tensor,
    n_iters: int = 8,
    tolerance: float | None = None,
    temperature: float = 1.0,
    row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None,
    mask: Tensor | None = None,
    return_scalings: bool = False,
) -> Tensor | Balanced:
    """P = diag(u) K diag(v), K = exp(logits / temperature), rows summing to r and columns to c.

        u_0 = r / (K 1);  v_i = c / (K^T u_{i-1}),  u_i = r / (K v_i)   for i = 1 .. n_iters

    Sinkhorn and Knopp, 1967; Cuturi, arXiv 1306.0895, algorithm 1, ended on the rows. A row or a
    column in which everything is forbidden stays zero.
    """
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    forbidden = -torch.inf
    x = logits.to(real) / temperature
    r = torch.ones_like(x[..., 0]) if row_marginals is None else row_marginals.expand_as(x[..., 0])
    if mask is not None:
        x, r = x.masked_fill(~mask[..., None], forbidden), r * mask
    total = r.sum(-1, keepdim=True)
    c = total / x.shape[-1] if col_marginals is None else col_marginals
    c = c.expand_as(log_v := torch.zeros_like(total).expand(*x.shape[:-2], x.shape[-1]))

    def rows(log_v: Tensor) -> Tensor:  # log u
        return _log_scaling(r, x + log_v[..., None, :], -1, forbidden)

    def plan(log_u: Tensor, log_v: Tensor) -> Tensor:
        return (x + log_u[..., None] + log_v[..., None, :]).exp()

    def column_error(log_u: Tensor, log_v: Tensor) -> Tensor:
        wrong = (plan(log_u, log_v).sum(-2) - c).abs().sum(-1)
        return wrong / total[..., 0].clamp(min=torch.finfo(real).tiny)

    log_u = rows(log_v)
    iterations = torch.zeros(x.shape[:-2], dtype=torch.int32, device=x.device)
    for _ in range(n_iters):
        going = torch.ones_like(iterations, dtype=torch.bool)
        if tolerance is not None:
            going = ~(column_error(log_u, log_v) <= tolerance)
        new_v = _log_scaling(c, x + log_u[..., None], -2, log_v)
        log_v = torch.where(going[..., None], new_v, log_v)
        log_u = torch.where(going[..., None], rows(log_v), log_u)
        iterations = iterations + going
    if not return_scalings:
        return plan(log_u, log_v)
    return Balanced(plan(log_u, log_v), log_u, log_v, column_error(log_u, log_v), iterations)


def _log_scaling(marginals: Tensor, x: Tensor, dim: int, where_empty: float | Tensor) -> Tensor:
    """log(marginals / sum(exp(x))); `where_empty` where all that is summed is zero."""
    if x.shape[dim] == 0:
        return torch.zeros_like(marginals)
    empty = (x == -torch.inf).all(dim)
    total = torch.where(empty.unsqueeze(dim), 0.0, x).logsumexp(dim)  # no NaN gradients
    return torch.where(empty, where_empty, marginals.log() - total)
