"""Sinkhorn balancing: scale a matrix of scores so that rows and columns have given sums.

Symbols: T tokens (rows), E experts (columns, at most 1024). Logits are float32, bfloat16 or
float16, and float64 on the CPU; everything else is float32 (float64 for float64). It works on the
CPU and on CUDA, gives the same bits on every run, and never waits for the device unless asked to
check values there.
"""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from ..types import Balanced
from ._sinkhorn_autograd import Implicit

__all__ = ["sinkhorn"]

_ops = torch.ops.sparsemoe
_SMALL = 64  # kSmallSize of csrc/sinkhorn/sinkhorn.h


@overload
def sinkhorn(
    logits: Tensor,
    n_iters: int = ...,
    tolerance: float | None = ...,
    temperature: float = ...,
    row_marginals: Tensor | None = ...,
    col_marginals: Tensor | None = ...,
    mask: Tensor | None = ...,
    *,
    return_scalings: Literal[False] = ...,
    gradient: str = ...,
    check: bool | None = ...,
) -> Tensor: ...


@overload
def sinkhorn(
    logits: Tensor,
    n_iters: int = ...,
    tolerance: float | None = ...,
    temperature: float = ...,
    row_marginals: Tensor | None = ...,
    col_marginals: Tensor | None = ...,
    mask: Tensor | None = ...,
    *,
    return_scalings: Literal[True],
    gradient: str = ...,
    check: bool | None = ...,
) -> Balanced: ...


def sinkhorn(
    logits: Tensor,
    n_iters: int = 8,
    tolerance: float | None = None,
    temperature: float = 1.0,
    row_marginals: Tensor | None = None,
    col_marginals: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    return_scalings: bool = False,
    gradient: str = "exact",
    check: bool | None = None,
) -> Tensor | Balanced:
    """P = diag(u) exp(logits / temperature) diag(v) with rows and columns of given sums.

        u_0 = r / (K 1);  v_i = c / (K^T u_{i-1}),  u_i = r / (K v_i)   for i = 1 .. n_iters

    Rows sum to r, to rounding; columns approach c. Any finite logits will do: where scalings leave
    the range of float32 the work goes on with logarithms in float64. Sinkhorn and Knopp, 1967;
    Cuturi, arXiv 1306.0895.

    Args:
        logits: [..., T, E]; leading dimensions are problems of their own. -inf forbids an expert.
        n_iters: iterations at most, 1 or more.
        tolerance: end a problem before an iteration where the error is at or below it; decided on
            the device. The error is sum_e |column sum - c_e| / sum(r), from 0 to 2.
        temperature: above 0.
        row_marginals: r, [T] or [..., T], 0 or more; None: ones.
        col_marginals: c, [E] or [..., E], 0 or more, of r's sum; None: that sum / E each.
        mask: [..., T] bool; False: the row takes no part, and is zero.
        return_scalings: return also log u, log v, the error and the iterations that ran.
        gradient: "exact", that of the iterations that ran, or "implicit", what it would be at
            convergence: right where the error is small, and computed from P alone. Both are
            to the logits; marginals get none.
        check: look at values before any work: marginals below zero or of different sums, and rows
            in which every expert is forbidden (zeros in the plan), raise ValueError. None: on the
            CPU only, and not where torch.compile traces; on a GPU looking waits for the device.

    Returns:
        P [..., T, E], or Balanced(plan, log_u, log_v, error, iterations).
    """
    if gradient not in ("exact", "implicit"):
        raise ValueError(f"gradient must be 'exact' or 'implicit', got {gradient!r}")
    if logits.dim() >= 2:  # other shapes are refused by the op
        row_marginals = _fit(row_marginals, logits, logits.shape[:-1], "row_marginals", "tokens")
        columns = (*logits.shape[:-2], logits.shape[-1])
        col_marginals = _fit(col_marginals, logits, columns, "col_marginals", "experts")
        if check is None:
            check = logits.device.type == "cpu" and not torch.compiler.is_compiling()
        if check:
            _check_values(logits, row_marginals, col_marginals, mask)
    differentiable = torch.is_grad_enabled() and logits.requires_grad
    small = logits.dim() >= 2 and logits.shape[-1] <= _SMALL and logits.shape[-2] <= _SMALL
    keep = differentiable and gradient == "exact" and not small
    plan, log_u, log_v, error, state, _ = _ops.sinkhorn.default(
        logits.detach() if gradient == "implicit" else logits,
        n_iters,
        tolerance,
        temperature,
        row_marginals,
        col_marginals,
        mask,
        keep,
        return_scalings,
    )
    if differentiable and gradient == "implicit":
        plan = Implicit.apply(plan, logits, temperature)
    if not return_scalings:
        return plan
    return Balanced(plan, log_u, log_v, error, state[..., 0])


def _fit(
    marginals: Tensor | None, logits: Tensor, shape: tuple[int, ...], name: str, of: str
) -> Tensor | None:
    """Marginals of one problem are those of all."""
    if marginals is None:
        return None
    if marginals.shape != shape and marginals.shape != shape[-1:]:
        raise ValueError(
            f"{name} must have shape [{of}] = [{shape[-1]}] or {list(shape)},"
            f" got {list(marginals.shape)}"
        )
    real = torch.float64 if logits.dtype == torch.float64 else torch.float32
    return marginals.detach().to(real).expand(shape)


def _check_values(
    logits: Tensor, rows: Tensor | None, columns: Tensor | None, mask: Tensor | None
) -> None:
    for name, marginals in (("row_marginals", rows), ("col_marginals", columns)):
        if marginals is not None and marginals.numel():
            least = marginals.min().item()
            if not least >= 0:
                raise ValueError(f"{name} must be 0 or more, got {least}")
    kept = mask
    if mask is None or mask.shape != logits.shape[:-1] or mask.dtype != torch.bool:
        kept = None  # the op refuses others than these
    if columns is not None:
        r = logits.new_ones(logits.shape[:-1], dtype=columns.dtype) if rows is None else rows
        totals = (r if kept is None else r * kept).sum(-1)
        sums = columns.sum(-1)
        apart = (sums - totals).abs() > 1e-3 * totals
        if apart.any():
            raise ValueError(
                f"col_marginals must sum to what the rows sum to, {totals[apart][0].item():g}, got"
                f" {sums[apart][0].item():g}"
            )
    if logits.numel() and logits.is_floating_point():
        forbidden = logits.amax(-1) == -torch.inf
        if kept is not None:
            forbidden &= kept
        if rows is not None:
            forbidden &= rows > 0
        if forbidden.any():
            where = forbidden.nonzero()[0].tolist()
            raise ValueError(
                f"logits must allow every token an expert, got only -inf in row {where}"
            )
