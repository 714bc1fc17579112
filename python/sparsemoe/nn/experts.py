"""The feed-forward networks that tokens are routed to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..ops.moe import ACTIVATIONS
from ..reference.moe import activate
from ..types import Plan


def _init_uniform(weight: Tensor, bias: Tensor | None) -> None:
    """torch.nn.Linear's initialisation, for a stack of matrices [..., out, in]."""
    bound = weight.shape[-1] ** -0.5
    nn.init.uniform_(weight, -bound, bound)
    if bias is not None:
        nn.init.uniform_(bias, -bound, bound)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be 1 or more, got {size}")


class Experts(nn.Module):
    """E feed-forward networks whose weights lie in two tensors, as in transformers 5.

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: F.
        activation: "swiglu", "geglu", "relu2", "silu" or "gelu".
        bias: whether both projections add one.
        recompute: in the backward pass run the first projection again rather than keep what it
            gave, which is the most of a layer's memory.

    Attributes:
        gate_up_proj: [E, 2F, H], the gate's rows first; [E, F, H] for an activation without gate.
        down_proj: [E, H, F].
        gate_up_proj_bias, down_proj_bias: [E, 2F] or [E, F], and [E, H]; None without bias.
    """

    gate_up_proj_bias: nn.Parameter | None
    down_proj_bias: nn.Parameter | None

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
        bias: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        _check_sizes(
            num_experts=num_experts, hidden_size=hidden_size, intermediate_size=intermediate_size
        )
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}"
            )
        self.activation = activation
        self.recompute = recompute
        width = ACTIVATIONS[activation] * intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num_experts, width, hidden_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, hidden_size, intermediate_size))
        for name, size in (("gate_up_proj_bias", width), ("down_proj_bias", hidden_size)):
            parameter = nn.Parameter(torch.empty(num_experts, size)) if bias else None
            self.register_parameter(name, parameter)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _init_uniform(self.gate_up_proj, self.gate_up_proj_bias)
        _init_uniform(self.down_proj, self.down_proj_bias)

    def forward(self, x: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
        """x [T, H] -> y [T, H]; see :func:`sparsemoe.ops.moe.experts`."""
        return ops.moe.experts(
            x,
            self.gate_up_proj,
            self.down_proj,
            plan,
            weights,
            self.activation,
            gate_up_bias=self.gate_up_proj_bias,
            down_bias=self.down_proj_bias,
            recompute=self.recompute,
        )

    def extra_repr(self) -> str:
        n, hidden, inner = self.down_proj.shape
        bias = self.down_proj_bias is not None
        return f"{n}, {hidden}, {inner}, activation={self.activation!r}, bias={bias}"


class SharedExperts(nn.Module):
    """A feed-forward network that every token passes, as wide as `num_experts` experts.

    The sum of several experts without weights is one wider expert, so that is what it is.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        activation: str = "swiglu",
    ) -> None:
        super().__init__()
        _check_sizes(num_experts=num_experts)
        self.activation = activation
        inner = num_experts * intermediate_size
        self.gate_up_proj = nn.Linear(hidden_size, ACTIVATIONS[activation] * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(activate(self.gate_up_proj(x), self.activation))


class RouterLinear(nn.Linear):
    """A linear layer without bias that computes in float32 or wider, also under autocast."""

    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__(hidden_size, num_experts, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return ops.moe.router_linear(x, self.weight)
