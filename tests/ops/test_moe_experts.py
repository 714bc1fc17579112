import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.moe_cases import routed


def layer(n_tokens, hidden, inner, n_experts, activation, device, dtype):
    width = moe.ACTIVATIONS[activation] * inner
    x = torch.randn(n_tokens, hidden, device=device)
    up = torch.randn(n_experts, width, hidden, device=device) * hidden**-0.5
    down = torch.randn(n_experts, hidden, inner, device=device) * inner**-0.5
    return [t.to(dtype).requires_grad_() for t in (x, up, down)]


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
@pytest.mark.parametrize("capacity", [None, 6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts(device, activation, capacity, dtype):
    """Against the reference in float64 on the same rounded inputs."""
    inputs = layer(40, 48, 24, 5, activation, device, dtype)
    experts, weights = routed(40, 5, 2, device, skew=1.5)
    plan = moe.plan(experts, 5, capacity=capacity)
    weights.requires_grad_()
    y = moe.experts(*inputs, plan, weights, activation)
    exact = [t.detach().double().cpu().requires_grad_() for t in (*inputs, weights)]
    host_plan = type(plan)(*(None if t is None else t.cpu() for t in plan))
    expected = reference.experts(*exact[:3], host_plan, exact[3], activation)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]

    def near(a, b):
        assert (a.cpu().double() - b).norm() <= tolerance * b.norm() + 1e-12

    near(y, expected)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    expected.backward(upstream.double().cpu())
    for actual, reference_input in zip((*inputs, weights), exact, strict=True):
        near(actual.grad, reference_input.grad)


def test_sizes_that_no_library_kernel_takes(device):
    """Rows that are no multiple of 16 bytes."""
    inputs = layer(10, 5, 3, 4, "swiglu", device, torch.bfloat16)
    experts, weights = routed(10, 4, 2, device)
    plan = moe.plan(experts, 4)
    moe.experts(*inputs, plan, weights).sum().backward()
    assert all(t.grad.isfinite().all() for t in inputs)


@pytest.mark.parametrize("case", ["no tokens", "one expert takes all", "no expert"])
def test_awkward_routing(device, case):
    n_tokens = 0 if case == "no tokens" else 16
    inputs = layer(n_tokens, 16, 8, 4, "swiglu", device, torch.bfloat16)
    chosen = {"one expert takes all": 2, "no expert": -1}.get(case, 0)
    experts = torch.full((n_tokens, 1), chosen, dtype=torch.int32, device=device)
    y = moe.experts(*inputs, moe.plan(experts, 4))
    assert y.shape == (n_tokens, 16) and y.isfinite().all()
    y.sum().backward()
    used = inputs[1].grad.flatten(1).norm(dim=1) > 0
    assert used.tolist() == [False, False, chosen == 2, False]


def test_gradient_in_float64():
    inputs = layer(6, 4, 3, 3, "swiglu", "cpu", torch.float64)
    experts, weights = routed(6, 3, 2, "cpu")
    plan = moe.plan(experts, 3, capacity=3)
    weights = weights.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, up, down, w: moe.experts(x, up, down, plan, w), (*inputs, weights)
    )


def test_unused_rows_are_zero_on_the_cpu():
    """Deterministic mode fills new memory with NaN."""
    offsets = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    x, weight = torch.randn(5, 4, requires_grad=True), torch.randn(3, 6, 4, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        y = moe.grouped_linear(x, weight, offsets)
        grads = torch.autograd.grad(y, (x, weight), torch.ones_like(y))
    finally:
        torch.use_deterministic_algorithms(False)
    assert (y[3:] == 0).all() and (grads[0][3:] == 0).all()
    assert (grads[1][1] == 0).all() and all(g.isfinite().all() for g in grads)
