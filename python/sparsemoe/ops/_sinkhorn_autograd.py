"""Shapes (for torch.compile and torch.export) and gradients of the sinkhorn op."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

_ops = torch.ops.sparsemoe


@register_fake("sparsemoe::sinkhorn")
def _(
    logits,
    n_iters=8,
    tolerance=None,
    temperature=1.0,
    row_marginals=None,
    col_marginals=None,
    mask=None,
    keep=False,
    measure=False,
):
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    *leading, n_rows, n_columns = logits.shape
    return (
        logits.new_empty(logits.shape, dtype=real),
        logits.new_empty((*leading, n_rows) if measure else (0,), dtype=real),
        logits.new_empty((*leading, n_columns) if measure else (0,), dtype=real),
        logits.new_empty(leading if measure else (0,), dtype=real),
        logits.new_empty((*leading, 2), dtype=torch.int32),
        logits.new_empty((*leading, n_iters, n_columns) if keep else (0,), dtype=torch.float64),
    )


@register_fake("sparsemoe::sinkhorn_backward")
def _(grad, logits, n_iters, tolerance, temperature, rows, columns, mask, state, history):
    return logits.new_empty(logits.shape)


def _context(ctx, inputs, output):
    logits, ctx.n_iters, ctx.tolerance, ctx.temperature, rows, columns, mask, _, _ = inputs
    ctx.save_for_backward(logits, rows, columns, mask, *output[4:])
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad, *_):
    logits, *marginals, state, history = ctx.saved_tensors
    settings = ctx.n_iters, ctx.tolerance, ctx.temperature
    grad_logits = _ops.sinkhorn_backward.default(
        grad, logits, *settings, *marginals, state, history
    )
    return (grad_logits, *[None] * 8)


register_autograd("sparsemoe::sinkhorn", _backward, setup_context=_context)


class Implicit(torch.autograd.Function):
    """The plan itself, with the gradient that it would have at convergence.

    At convergence P is a function of its marginals and the logits alone. With H = P * dP, a and b
    the sums of P's rows and columns: solve [diag a, P; P^T, diag b] [x; y] = [H 1; H^T 1], then
    dlogits = (H - P * (x + y)) / temperature (arXiv 2606.07574). Eliminating x leaves E equations.
    """

    @staticmethod
    def forward(ctx, plan: Tensor, logits: Tensor, temperature: float) -> Tensor:
        ctx.save_for_backward(plan)
        ctx.temperature, ctx.dtype = temperature, logits.dtype
        return plan.view_as(plan)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (plan,) = ctx.saved_tensors
        h = plan * grads[0]
        p = plan.double()
        a = p.sum(-1, keepdim=True)
        p_rows = torch.where(a > 0, p / a, 0.0)  # [..., T, E]
        h_rows, h_columns = h.double().sum(-1, keepdim=True), h.double().sum(-2)
        b = p.sum(-2)
        schur = -(p_rows.mT @ p)
        # x and y are free up to a constant for each connected part of P: a little more on the
        # diagonal than stands there chooses one of them.
        extra = 1e-9 * b + torch.where(b > 0, 0.0, 1.0)
        schur = schur + torch.diag_embed(b + extra)
        right = h_columns[..., None] - p_rows.mT @ h_rows
        factor = torch.linalg.cholesky_ex(schur).L
        y = torch.cholesky_solve(right, factor)  # [..., E, 1]
        x = torch.where(a > 0, (h_rows - p @ y) / a, 0.0)  # [..., T, 1]
        grad = (h - plan * (x + y.mT).to(plan.dtype)) / ctx.temperature
        return None, grad.to(ctx.dtype), None
