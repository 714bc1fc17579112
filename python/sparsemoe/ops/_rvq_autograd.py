"""Shapes (for torch.compile and torch.export) and gradients of the rvq ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import register_autograd, register_fake

_ops = torch.ops.sparsemoe


def _real(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _encoded(x: Tensor, n_stages: int | torch.SymInt) -> tuple[Tensor, Tensor, Tensor]:
    n = x.shape[0]
    return (
        x.new_empty((n, n_stages), dtype=torch.int32),
        x.new_empty(x.shape),
        x.new_empty((n, n_stages), dtype=_real(x)),
    )


@register_fake("sparsemoe::rvq_encode")
def _(x, codebooks, n_stages, metric="l2", exact=True):
    return _encoded(x, n_stages)


@register_fake("sparsemoe::rvq_beam_encode")
def _(x, codebooks, n_stages, beam):
    return _encoded(x, n_stages)


@register_fake("sparsemoe::rvq_encode_backward")
def _(grad_quantized, grad_errors, x, codebooks, codes):
    return x.new_empty(x.shape)


@register_fake("sparsemoe::rvq_decode")
def _(codes, codebooks):
    return codebooks.new_empty((codes.shape[0], codebooks.shape[2]))


@register_fake("sparsemoe::rvq_code_sums")
def _(x, codes, num_codes, codebooks=None, weights=None, after=False):
    n_stages = codes.shape[1]
    return (
        x.new_empty((n_stages, num_codes, x.shape[1]), dtype=_real(x)),
        x.new_empty((n_stages, num_codes), dtype=_real(x)),
    )


@register_fake("sparsemoe::rvq_ema_")
def _(codebooks, cluster_size, embed_sum, sums, counts, decay, epsilon):
    return None


def _encode_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], inputs[1], output[0])
    ctx.mark_non_differentiable(output[0])


def _encode_backward(ctx, _, grad_quantized, grad_errors):
    """quantized: straight through to x. errors: 2 r_q to x, -2 r_q to the code of stage q."""
    x, codebooks, codes = ctx.saved_tensors
    grad_x = grad_codebooks = None
    if ctx.needs_input_grad[0]:
        grad_x = _ops.rvq_encode_backward.default(grad_quantized, grad_errors, x, codebooks, codes)
    if ctx.needs_input_grad[1]:
        weights = -2 * grad_errors
        sums, _ = _ops.rvq_code_sums.default(x, codes, codebooks.shape[1], codebooks, weights, True)
        grad_codebooks = _padded(sums, codebooks)
    return grad_x, grad_codebooks


def _padded(sums: Tensor, codebooks: Tensor) -> Tensor:
    """Stages that were not used have no gradient."""
    unused = codebooks.shape[0] - sums.shape[0]
    return (F.pad(sums, (0, 0, 0, 0, 0, unused)) if unused else sums).to(codebooks.dtype)


def _greedy_backward(ctx, *grads):
    return (*_encode_backward(ctx, *grads), None, None, None)


def _beam_backward(ctx, *grads):
    return (*_encode_backward(ctx, *grads), None, None)


register_autograd("sparsemoe::rvq_encode", _greedy_backward, setup_context=_encode_context)
register_autograd("sparsemoe::rvq_beam_encode", _beam_backward, setup_context=_encode_context)


def _decode_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _decode_backward(ctx, grad):
    codes, codebooks = ctx.saved_tensors
    sums, _ = _ops.rvq_code_sums.default(grad, codes, codebooks.shape[1])
    return None, _padded(sums, codebooks)


register_autograd("sparsemoe::rvq_decode", _decode_backward, setup_context=_decode_context)


class Rotate(torch.autograd.Function):
    """Forward: quantized. Backward: the transpose of the map in `reference.rvq.rotate`."""

    @staticmethod
    def forward(ctx, x, quantized):
        ctx.save_for_backward(x, quantized)
        return quantized.to(x.dtype, copy=True)

    @staticmethod
    def backward(ctx, grad):
        x, q = (t if t.dtype == torch.float64 else t.float() for t in ctx.saved_tensors)
        g = grad.to(x.dtype)
        u, v = F.normalize(x, dim=-1), F.normalize(q, dim=-1)
        w = F.normalize(u + v, dim=-1)
        scale = q.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        along_w, along_v = (g * w).sum(-1, keepdim=True), (g * v).sum(-1, keepdim=True)
        grad_x = scale * (g - 2 * along_w * w + 2 * along_v * u)
        return grad_x.to(ctx.saved_tensors[0].dtype), None
