"""One matrix product an expert, by the libraries that torch brings.

On a GPU of compute capability 9.0 or later in bfloat16: torch's grouped_mm, one launch, no host
sync. Everywhere else a loop over the experts, which on a GPU reads the offsets back (a host sync)
and so cannot be captured in a CUDA graph.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.library import impl, register_autograd, register_fake

_ops = torch.ops.sparsemoe
_grouped_mm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(
    torch, "_grouped_mm", None
)


def _in_one_launch(*tensors: Tensor) -> bool:
    """Whether torch's grouped_mm takes these: rows must be multiples of 16 bytes."""
    first = tensors[0]
    return (
        _grouped_mm is not None
        and first.is_cuda
        and all(t.dtype == torch.bfloat16 and t.shape[-1] % 8 == 0 for t in tensors)
        and torch.cuda.get_device_capability(first.device) >= (9, 0)
    )


def _each(x: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """Each expert's rows of x [rows, in] times its matrix of [experts, in, out]; unused rows: 0."""
    bounds = offsets.tolist()
    y = x.new_empty(x.shape[0], matrices.shape[2])
    y[bounds[-1] :] = 0
    for matrix, (a, b) in zip(matrices, pairwise(bounds), strict=True):
        if b > a:
            torch.mm(x[a:b], matrix, out=y[a:b])
    return y


def _check(x: Tensor, weight: Tensor, offsets: Tensor, name: str) -> None:
    if x.dim() != 2 or weight.dim() != 3 or x.dtype != weight.dtype:
        raise ValueError(
            f"{name} must have shape [rows, features] and weight [experts, out, in], of one dtype,"
            f" got {tuple(x.shape)} {x.dtype} and {tuple(weight.shape)} {weight.dtype}"
        )
    if offsets.shape != (weight.shape[0] + 1,) or offsets.dtype != torch.int32:
        raise ValueError(
            f"offsets must be int32 [experts + 1] = [{weight.shape[0] + 1}],"
            f" got {offsets.dtype} {list(offsets.shape)}"
        )


def _forward(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    _check(x, weight, offsets, "x")
    if x.shape[1] != weight.shape[2]:
        raise ValueError(
            f"x must have the {weight.shape[2]} columns of weight {list(weight.shape)},"
            f" got {list(x.shape)}"
        )
    if _in_one_launch(x, weight, weight.mT):
        return _grouped_mm(x.contiguous(), weight.contiguous().mT, offs=offsets[1:])
    return _each(x, weight.mT, offsets)


def _backward_x(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    _check(grad, weight, offsets, "grad")
    if _in_one_launch(grad, weight, weight.mT):
        return _grouped_mm(grad.contiguous(), weight.contiguous(), offs=offsets[1:])
    return _each(grad, weight, offsets)


def _backward_weight(grad: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    if _in_one_launch(grad, x):
        return _grouped_mm(grad.contiguous().mT, x.contiguous(), offs=offsets[1:])
    grad_weight = x.new_empty(offsets.shape[0] - 1, grad.shape[1], x.shape[1])
    for of_expert, (a, b) in zip(grad_weight, pairwise(offsets.tolist()), strict=True):
        torch.mm(grad[a:b].T, x[a:b], out=of_expert)  # zeros where there is no row
    return grad_weight


for _device in ("CPU", "CUDA"):
    impl("sparsemoe::grouped_linear", _device)(_forward)
    impl("sparsemoe::grouped_linear_backward_x", _device)(_backward_x)
    impl("sparsemoe::grouped_linear_backward_weight", _device)(_backward_weight)


@register_fake("sparsemoe::grouped_linear")
def _(x, weight, offsets):
    return x.new_empty((x.shape[0], weight.shape[1]))


@register_fake("sparsemoe::grouped_linear_backward_x")
def _(grad, weight, offsets):
    return grad.new_empty((grad.shape[0], weight.shape[2]))


@register_fake("sparsemoe::grouped_linear_backward_weight")
def _(grad, x, offsets):
    return x.new_empty((offsets.shape[0] - 1, grad.shape[1], x.shape[1]))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad):
    x, weight, offsets = ctx.saved_tensors
    grad_x = grad_weight = None
    if ctx.needs_input_grad[0]:
        grad_x = _ops.grouped_linear_backward_x.default(grad, weight, offsets)
    if ctx.needs_input_grad[1]:
        grad_weight = _ops.grouped_linear_backward_weight.default(grad, x, offsets)
    return grad_x, grad_weight, None


register_autograd("sparsemoe::grouped_linear", _backward, setup_context=_setup_context)
