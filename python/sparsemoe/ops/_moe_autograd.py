"""Shapes (for torch.compile and torch.export) and gradients of the moe ops."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

_ops = torch.ops.sparsemoe


def _real(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _int(like: Tensor, *size: int | torch.SymInt) -> Tensor:
    return like.new_empty(size, dtype=torch.int32)


# gate


@register_fake("sparsemoe::gate")
def _(
    logits,
    top_k,
    scoring="softmax",
    renormalize=False,
    scale=1.0,
    bias=None,
    n_group=1,
    topk_group=1,
    threshold=None,
    mask=None,
):
    n_tokens = logits.shape[0]
    return (
        logits.new_empty((n_tokens, top_k), dtype=_real(logits)),
        _int(logits, n_tokens, top_k),
        logits.new_empty((n_tokens,), dtype=_real(logits)),
    )


@register_fake("sparsemoe::gate_backward")
def _(grad_weights, grad_lse, logits, weights, experts, logsumexp, scoring, renorm, scale, mask):
    return logits.new_empty(logits.shape)


def _gate_context(ctx, inputs, output):
    logits, _, ctx.scoring, ctx.renormalize, ctx.scale, _, _, _, _, mask = inputs
    ctx.save_for_backward(logits, *output, mask)


def _gate_backward(ctx, grad_weights, _, grad_logsumexp):
    logits, weights, experts, logsumexp, mask = ctx.saved_tensors
    grad = _ops.gate_backward.default(
        grad_weights,
        grad_logsumexp,
        logits,
        weights,
        experts,
        logsumexp,
        ctx.scoring,
        ctx.renormalize,
        ctx.scale,
        mask,
    )
    return (grad, *[None] * 9)


register_autograd("sparsemoe::gate", _gate_backward, setup_context=_gate_context)


# expert_choice


@register_fake("sparsemoe::expert_choice")
def _(logits, capacity, n_groups=1, mask=None):
    n_experts = logits.shape[1]
    n_chosen = n_groups * capacity
    return (
        logits.new_empty((n_experts, n_chosen), dtype=_real(logits)),
        _int(logits, n_experts, n_chosen),
        logits.new_empty((n_groups, n_experts), dtype=_real(logits)),
    )


@register_fake("sparsemoe::expert_choice_backward")
def _(grad_weights, logits, tokens):
    return logits.new_empty(logits.shape)


def _expert_choice_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[1])
    ctx.mark_non_differentiable(output[1], output[2])


def _expert_choice_backward(ctx, grad_weights, *_):
    logits, tokens = ctx.saved_tensors
    return _ops.expert_choice_backward.default(grad_weights, logits, tokens), None, None, None


register_autograd(
    "sparsemoe::expert_choice", _expert_choice_backward, setup_context=_expert_choice_context
)


# plan


@register_fake("sparsemoe::plan")
def _(experts, num_experts, capacity=None, weights=None):
    n_tokens, top_k = experts.shape
    n_rows = n_tokens * top_k
    if capacity is not None:
        n_rows = torch.sym_min(n_rows, num_experts * torch.sym_min(capacity, n_rows))
    return (
        _int(experts, num_experts + 1),
        _int(experts, num_experts),
        _int(experts, n_rows),
        _int(experts, n_rows),
        _int(experts, n_tokens, top_k),
    )


@register_fake("sparsemoe::plan_from_tokens")
def _(tokens, num_tokens):
    n_experts, per_expert = tokens.shape
    n_rows = n_experts * per_expert
    return (
        _int(tokens, n_experts + 1),
        _int(tokens, n_experts),
        _int(tokens, n_rows),
        _int(tokens, n_rows),
        _int(tokens, n_rows),
        _int(tokens, num_tokens + 1),
    )


# dispatch and combine


@register_fake("sparsemoe::dispatch")
def _(x, row_token, row_pair, token_rows, token_offsets=None):
    return x.new_empty((row_token.shape[0], x.shape[1]))


@register_fake("sparsemoe::combine")
def _(rows, weights, row_token, row_pair, token_rows, token_offsets=None):
    n_tokens = token_rows.shape[0] if token_offsets is None else token_offsets.shape[0] - 1
    return rows.new_empty((n_tokens, rows.shape[1]))


@register_fake("sparsemoe::combine_backward")
def _(grad, rows, weights, row_token, row_pair, token_rows, token_offsets):
    return rows.new_empty(rows.shape), weights.new_empty(weights.shape)


def _dispatch_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _dispatch_backward(ctx, grad):
    return _ops.combine.default(grad, None, *ctx.saved_tensors), None, None, None, None


def _combine_context(ctx, inputs, output):
    rows, weights, *plan = inputs
    ctx.save_for_backward(None if weights is None else rows, weights, *plan)


def _combine_backward(ctx, grad):
    rows, weights, *plan = ctx.saved_tensors
    if weights is None:
        return (_ops.dispatch.default(grad, *plan), *[None] * 5)
    grad_rows, grad_weights = _ops.combine_backward.default(grad, rows, weights, *plan)
    return (grad_rows, grad_weights, *[None] * 4)


register_autograd("sparsemoe::dispatch", _dispatch_backward, setup_context=_dispatch_context)
register_autograd("sparsemoe::combine", _combine_backward, setup_context=_combine_context)


# losses


@register_fake("sparsemoe::load_balance_loss")
def _(logits, counts, mask=None):
    return logits.new_empty((), dtype=_real(logits))


@register_fake("sparsemoe::load_balance_loss_backward")
def _(grad, logits, counts, mask):
    return logits.new_empty(logits.shape)


@register_fake("sparsemoe::router_z_loss")
def _(logsumexp, mask=None):
    return logsumexp.new_empty(())


@register_fake("sparsemoe::router_z_loss_backward")
def _(grad, logsumexp, mask):
    return logsumexp.new_empty(logsumexp.shape)


@register_fake("sparsemoe::update_expert_bias_")
def _(bias, counts, rate):
    return None


def _save_inputs(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _load_balance_backward(ctx, grad):
    return _ops.load_balance_loss_backward.default(grad, *ctx.saved_tensors), None, None


def _z_loss_backward(ctx, grad):
    return _ops.router_z_loss_backward.default(grad, *ctx.saved_tensors), None


register_autograd(
    "sparsemoe::load_balance_loss", _load_balance_backward, setup_context=_save_inputs
)
register_autograd("sparsemoe::router_z_loss", _z_loss_backward, setup_context=_save_inputs)
