"""Random layers of experts, and their comparison with the reference in float64."""

from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.moe_cases import HALVES

# Relative error that a row of y, or of a gradient, may have.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}
DTYPES = [torch.float32, *HALVES]

# Around the tiles of the GPU's kernels: 128 rows by 256 columns, 64 deep.
RAGGED = [0, 1, 2, 127, 128, 129, 0, 31, 257, 3]
SIZES = [(64, 64), (200, 136), (136, 264), (264, 200), (72, 520), (37, 29)]


class Inputs(NamedTuple):
    x: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    weights: Tensor | None

    def run(self, plan, activation="swiglu", **options):
        x, up, down, up_bias, down_bias, weights = self
        biases = {"gate_up_bias": up_bias, "down_bias": down_bias}
        return moe.experts(x, up, down, plan, weights, activation, **biases, **options)

    def expected(self, plan, activation="swiglu"):
        x, up, down, up_bias, down_bias, weights = self
        return reference.experts(x, up, down, plan, weights, activation, up_bias, down_bias)

    def given(self):
        return {name: t for name, t in self._asdict().items() if t is not None}

    def to(self, dtype):
        """Leaves with the same values; the routing weights stay float32 with half types."""
        wide = torch.promote_types(dtype, torch.float32)
        return Inputs(
            *(
                None if t is None else t.detach().to(wide if t is self.weights else dtype).clone()
                for t in self
            )
        ).differentiable()

    def differentiable(self):
        for t in self.given().values():
            t.requires_grad_()
        return self

    def grads(self):
        return {name: t.grad for name, t in self.given().items()}


def layer(n_tokens, hidden, inner, n_experts, device, dtype, weights=None, **options):
    """Random inputs. Options: activation, bias."""
    width = moe.ACTIVATIONS[options.get("activation", "swiglu")] * inner
    x = torch.randn(n_tokens, hidden, device=device)
    up = torch.randn(n_experts, width, hidden, device=device) * hidden**-0.5
    down = torch.randn(n_experts, hidden, inner, device=device) * max(inner, 1) ** -0.5
    up_bias = down_bias = None
    if options.get("bias"):
        up_bias = torch.randn(n_experts, width, device=device)
        down_bias = torch.randn(n_experts, hidden, device=device)
    return Inputs(x, up, down, up_bias, down_bias, weights).to(dtype)


def ragged_plan(counts, device):
    """One expert a token, in random order; and weights."""
    chosen = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    chosen = chosen[torch.randperm(len(chosen))].int()[:, None].to(device)
    return moe.plan(chosen, len(counts)), torch.rand(chosen.shape, device=device) + 0.5


def near(name, actual, expected, dtype, slack=1):
    """Row by row, so that one wrong row among many is seen. Small rows count as an average one."""
    assert actual.shape == expected.shape, name
    if not actual.numel():
        return
    if name == "weights":
        actual, expected = actual.reshape(-1, 1), expected.reshape(-1, 1)
    error = (actual.double() - expected.double()).flatten(0, -2).norm(dim=1)
    size = expected.double().flatten(0, -2).norm(dim=1)
    size = size.clamp(min=size.square().mean().sqrt().item() + 1e-30)
    worst = (error / size).max().item()
    assert worst <= slack * TOLERANCE[dtype], f"{name} is wrong by {worst:.2g}"


@contextmanager
def poisoned_memory():
    """Deterministic mode fills new memory with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check(inputs, plan, activation="swiglu", poisoned=False, slack=1, **options):
    """y and every gradient against the reference in float64 on the same rounded inputs."""
    dtype = inputs.x.dtype
    exact = inputs.to(torch.float64)
    expected = exact.expected(plan, activation)
    upstream = torch.randn(expected.shape, device=expected.device).to(dtype)
    with poisoned_memory() if poisoned else nullcontext():
        y = inputs.run(plan, activation, **options)
        y.backward(upstream)
    assert y.dtype == dtype
    near("y", y, expected, dtype)
    expected.backward(upstream.double())
    for (name, actual), wanted in zip(inputs.grads().items(), exact.grads().values(), strict=True):
        assert actual.dtype == getattr(inputs, name).dtype
        wanted = torch.zeros_like(actual) if wanted is None else wanted
        near(name, actual, wanted, dtype, slack)
