"""Shapes and gradients of the experts' ops, and gradients summed up outside of autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

_ops = torch.ops.sparsemoe


def _real(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _by_column(stack: Tensor) -> bool:
    """Whether matrices are stored by column, as csrc/moe/expert_inputs.h decides it."""
    _, n, m = stack.shape
    _, row, column = stack.stride()
    dense_rows = (m <= 1 or column == 1) and (n <= 1 or row >= m)
    return not dense_rows and (n <= 1 or row == 1) and (m <= 1 or column >= n)


@register_fake("sparsemoe::experts")
def _(
    x,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    weights,
    offsets,
    row_token,
    row_pair,
    token_rows,
    token_offsets,
    activation,
    keep,
):
    pre = (row_token.shape[0], gate_up_proj.shape[1]) if keep else (0,)
    return x.new_empty(x.shape), x.new_empty(pre)


@register_fake("sparsemoe::experts_backward")
def _(
    grad,
    x,
    gate_up_proj,
    down_proj,
    gate_up_bias,
    down_bias,
    weights,
    offsets,
    row_token,
    row_pair,
    token_rows,
    token_offsets,
    activation,
    pre,
    need_x,
    need_gate_up,
    need_down,
    gate_up_sum,
    down_sum,
):
    def like(argument, wanted=True):
        return x.new_empty(argument.shape if wanted and argument is not None else (0,))

    def like_stack(stack, wanted):
        if wanted and stack.is_cuda and _by_column(stack):
            return like(stack.mT).mT
        return like(stack, wanted)

    return (
        like(x, need_x),
        like_stack(gate_up_proj, need_gate_up and gate_up_sum is None),
        like_stack(down_proj, need_down and down_sum is None),
        like(gate_up_bias, need_gate_up),
        like(down_bias, need_down),
        weights.new_empty(weights.shape) if weights is not None else like(None).to(_real(x)),
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.activation, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad, need, sums=(None, None)):
    """To the arguments of experts."""
    if grad is None:
        return [None] * 13
    *tensors, pre = ctx.saved_tensors
    x, gate_up, down, gate_up_bias, down_bias = need[:5]
    grads = _ops.experts_backward.default(
        grad,
        *tensors,
        ctx.activation,
        pre,
        x,
        gate_up or gate_up_bias,
        down or down_bias,
        *sums,
    )
    returned = (x, gate_up and sums[0] is None, down and sums[1] is None, *need[3:6])
    return [g if r else None for g, r in zip(grads, returned, strict=True)] + [None] * 7


def _backward(ctx, grad, _):
    return tuple(_gradients(ctx, grad, ctx.needs_input_grad))


register_autograd("sparsemoe::experts", _backward, setup_context=_setup_context)


class ExpertsIntoSums(torch.autograd.Function):
    """experts whose backward pass adds the projections' gradients to sums that the caller keeps."""

    @staticmethod
    def forward(ctx: Any, sums: tuple[Tensor | None, Tensor | None], *inputs: Any) -> Tensor:
        y, pre = _ops.experts.default(*inputs)
        *tensors, ctx.activation, _ = inputs
        ctx.save_for_backward(*tensors, pre)
        ctx.sums = sums  # not saved for backward: every pass may change them
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, *_gradients(ctx, grads[0], ctx.needs_input_grad[1:], ctx.sums))


# grouped_mm


@register_fake("sparsemoe::grouped_mm")
def _(a, b, offsets):
    return a.new_empty((a.shape[0], b.shape[2]))


@register_fake("sparsemoe::grouped_mm_backward_b")
def _(a, grad, offsets, by_column):
    n_experts, n_in, n_out = offsets.shape[0] - 1, a.shape[1], grad.shape[1]
    if by_column:
        return a.new_empty((n_experts, n_out, n_in)).mT
    return a.new_empty((n_experts, n_in, n_out))


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3])


def _mm_backward(ctx, grad):
    a, b, offsets = ctx.saved_tensors
    grad_a = grad_b = None
    if ctx.needs_input_grad[0]:
        grad_a = _ops.grouped_mm.default(grad, b.mT, offsets)
    if ctx.needs_input_grad[1]:
        grad_b = _ops.grouped_mm_backward_b.default(a, grad, offsets, _by_column(b))
    return grad_a, grad_b, None


def _mm_backward_b_backward(ctx, grad):
    a, grad_y, offsets = ctx.saved_tensors
    grad_a = grad_grad_y = None
    if ctx.needs_input_grad[0]:
        grad_a = _ops.grouped_mm.default(grad_y, grad.mT, offsets)
    if ctx.needs_input_grad[1]:
        grad_grad_y = _ops.grouped_mm.default(a, grad, offsets)
    return grad_a, grad_grad_y, None, None


register_autograd("sparsemoe::grouped_mm", _mm_backward, setup_context=_save_inputs)
register_autograd(
    "sparsemoe::grouped_mm_backward_b", _mm_backward_b_backward, setup_context=_save_inputs
)
