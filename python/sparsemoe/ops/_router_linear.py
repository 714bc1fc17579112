"""Logits in float32 from tokens in bfloat16, by the tensor cores.

A float32 is the sum of three bfloat16, so that a product of bfloat16 tokens with float32 weights is
three products of bfloat16, summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.library import impl, register_autograd, register_fake
from torch.nn.functional import linear

_ops = torch.ops.sparsemoe


def _terms(x: Tensor, count: int) -> list[Tensor]:
    """bfloat16 tensors whose sum is x: exactly of three, to 2^-16 of it of two."""
    if x.dtype == torch.bfloat16:
        return [x]
    terms = []
    for _ in range(count):
        terms.append(x.bfloat16())
        x = x - terms[-1]
    return terms


def _in_terms(x: Tensor, weight: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.float)


def _wide(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _check(x: Tensor, weight: Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise RuntimeError(
            "x must have shape [tokens, hidden] and weight [experts, hidden],"
            f" got {list(x.shape)} and {list(weight.shape)}"
        )
    if not x.is_floating_point() or not weight.is_floating_point() or x.device != weight.device:
        raise RuntimeError(
            "x and weight must be real and on one device,"
            f" got {x.dtype} on {x.device} and {weight.dtype} on {weight.device}"
        )


def plain(x: Tensor, weight: Tensor) -> Tensor:
    """By a product of wide tensors, differentiable as such."""
    _check(x, weight)
    dtype = _wide(x, weight)
    return linear(x.to(dtype), weight.to(dtype))


def _forward(x: Tensor, weight: Tensor) -> Tensor:
    if not _in_terms(x, weight):
        return plain(x, weight)
    _check(x, weight)
    terms = _terms(weight, 3)
    if len(terms) == 1:
        return torch.mm(x, weight.T, out_dtype=torch.float32)
    logits = torch.mm(x, torch.cat(terms).T, out_dtype=torch.float32)
    return logits.view(len(x), 3, len(weight)).sum(1)


def _backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if not _in_terms(x, weight):
        grad_x = grad @ weight.to(grad.dtype)
        return grad_x.to(x.dtype), (grad.T @ x.to(grad.dtype)).to(weight.dtype)
    high, low = _terms(grad, 2)
    if weight.dtype == torch.bfloat16:
        both = torch.cat([high, low], 1)
        grad_x = both @ torch.cat([weight, weight])
    else:  # all but low times low
        first, second = _terms(weight, 2)
        three = torch.cat([high, high, low], 1)
        grad_x = three @ torch.cat([first, second, first])
        both = three[:, len(weight) :]
    sums = torch.mm(both.T, x, out_dtype=torch.float32)
    return grad_x, sums.view(2, *weight.shape).sum(0).to(weight.dtype)


def _as_it_is(function: Callable[..., Any]) -> Callable[..., Any]:
    """Autocast would reach the products inside of an implementation."""

    @wraps(function)
    def run(*tensors: Tensor) -> Any:
        with torch.autocast(tensors[0].device.type, enabled=False):
            return function(*tensors)

    return run


for _device in ("CPU", "CUDA"):
    impl("sparsemoe::router_linear", _device)(_as_it_is(_forward))
    impl("sparsemoe::router_linear_backward", _device)(_as_it_is(_backward))


@register_fake("sparsemoe::router_linear")
def _(x, weight):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=_wide(x, weight))


@register_fake("sparsemoe::router_linear_backward")
def _(grad, x, weight):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, grad):
    return _ops.router_linear_backward.default(grad, *ctx.saved_tensors)


register_autograd("sparsemoe::router_linear", _gradients, setup_context=_save)
