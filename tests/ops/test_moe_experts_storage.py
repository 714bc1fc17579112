"""Tensors that are not contiguous, and projections in every storage."""

import pytest
import torch

from sparsemoe.ops import moe
from tests.ops.expert_cases import DTYPES, RAGGED, SIZES, Inputs, check, layer, near, ragged_plan
from tests.ops.moe_cases import routed


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(device, dtype):
    experts, weights = routed(40, 5, 2, device)
    plan = moe.plan(experts, 5)
    plain = layer(40, 24, 16, 5, device, dtype, weights, bias=True)
    x = torch.stack([plain.x.detach(), plain.x.detach()], 1).flatten(1)[:, :24]
    up, down = (t.detach().mT.contiguous().mT for t in plain[1:3])
    up_bias, down_bias = (t.detach().T.contiguous().T for t in plain[3:5])
    strided = Inputs(x, up, down, up_bias, down_bias, weights.detach().T.contiguous().T)
    assert not any(t.is_contiguous() for t in strided)
    strided = strided.differentiable()
    y, y_plain = strided.run(plan), plain.run(plan)
    near("y", y, y_plain, dtype)
    upstream = torch.randn(24, 40, device=device).to(dtype).T
    y.backward(upstream)
    y_plain.backward(upstream.contiguous())
    for name, grad in strided.grads().items():
        near(name, grad, plain.grads()[name], dtype)
    sliced = Inputs(plain.x[:, 1:22], plain.gate_up_proj[:, :, 3:], *plain[2:])
    sliced = sliced._replace(down_proj=plain.down_proj[:, :21], down_bias=plain.down_bias[:, :21])
    near("y", sliced.run(plan), sliced.to(torch.float64).expected(plan), dtype)


@pytest.mark.parametrize("hidden, inner", SIZES)
@pytest.mark.parametrize("activation, recompute", [("swiglu", False), ("gelu", True)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_projections_by_column(device, dtype, activation, recompute, hidden, inner):
    plan, weights = ragged_plan(RAGGED, device)
    options = {"activation": activation, "bias": True}
    plain = layer(sum(RAGGED), hidden, inner, len(RAGGED), device, dtype, weights, **options)
    up, down = (t.detach().mT.contiguous().mT for t in plain[1:3])
    inputs = Inputs(*(t.detach() for t in (plain.x, up, down, *plain[3:]))).differentiable()
    check(inputs, plan, activation, recompute=recompute)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("n_tokens", [0, 3, 300])
def test_projections_inside_larger_tensors(device, dtype, by_column, n_tokens):
    """They are read where they lie."""
    n_experts, hidden, inner = 16, 256, 128
    experts, weights = routed(n_tokens, n_experts, 2, device)
    plan = moe.plan(experts, n_experts)
    plain = layer(n_tokens, hidden, inner, n_experts, device, dtype, weights)
    parts = []
    for t in (t.detach().mT if by_column else t.detach() for t in plain[1:3]):
        whole = torch.full((n_experts, t.shape[1] + 8, t.shape[2] + 16), torch.nan, device=device)
        part = whole.to(dtype)[:, : t.shape[1], : t.shape[2]].copy_(t)
        parts.append(part.mT if by_column else part)
    strided = Inputs(plain.x.detach().clone(), *parts, None, None, weights.detach().clone())
    if device == "cuda":
        with torch.no_grad():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            strided.run(plan)
            extra = torch.cuda.max_memory_allocated() - before
        assert extra < parts[1].numel() * parts[1].element_size()
    strided = strided.differentiable()
    y, y_plain = strided.run(plan), plain.run(plan)
    upstream = torch.randn(n_tokens, hidden, device=device).to(dtype)
    y.backward(upstream)
    y_plain.backward(upstream)
    grads = plain.grads()
    for name, actual, expected in [
        ("y", y, y_plain),
        *((name, grad, grads[name]) for name, grad in strided.grads().items()),
    ]:
        near(name, actual, expected, dtype)
        if device == "cuda" and not by_column:
            assert torch.equal(actual, expected), name  # the same kernels


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_matrix_for_all_experts(device, dtype):
    experts, weights = routed(300, 6, 2, device)
    plan = moe.plan(experts, 6)
    plain = layer(300, 64, 128, 1, device, dtype)
    shared = (t.detach().expand(6, -1, -1) for t in plain[1:3])
    x, weights = plain.x.detach(), weights.detach()
    shared = Inputs(x, *shared, None, None, weights).differentiable()
    check(shared, plan)
