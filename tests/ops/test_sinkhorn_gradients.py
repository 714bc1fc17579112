"""Gradients of sinkhorn against autograd through the float64 reference."""

from functools import partial

import pytest
import torch
from torch.autograd import gradcheck
from torch.testing import assert_close

from sparsemoe.ops.sinkhorn import sinkhorn
from tests.ops.sinkhorn_cases import TRAPS, check_gradient, dtypes, marginals, real

OPS = torch.ops.sparsemoe
# Small problems and large ones, which keep their scalings for the way back.
SHAPES = [(40, 4, 4), (3, 12, 7), (3, 13, 9), (2, 64, 64), (65, 3), (2, 100, 33)]


def bare(logits, n_iters, tolerance=None, temperature=1.0, mask=None, keep=False, **marginals):
    """The bare op, which keeps nothing unless asked."""
    sums = marginals.get("row_marginals"), marginals.get("col_marginals")
    return OPS.sinkhorn(logits, n_iters, tolerance, temperature, *sums, mask, keep)[0]


@pytest.mark.parametrize("n_experts", [1, 4, 17, 64, 100, 1024])
@pytest.mark.parametrize("n_tokens", [1, 5, 64, 65, 200])
def test_size(device, n_tokens, n_experts):
    check_gradient(2 * torch.randn(n_tokens, n_experts, device=device), n_iters=4)


@pytest.mark.parametrize("shape", [(4096, 64), (2, 3000, 8), (700, 256), (5000, 4, 4)])
def test_large(device, shape):
    check_gradient(torch.randn(shape, device=device), 20 if shape[-1] == 4 else 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_dtype(device, shape):
    for dtype in dtypes(device):
        check_gradient((2 * torch.randn(shape, device=device)).to(dtype))


@pytest.mark.parametrize("n_iters", [1, 2, 3, 6, 64, 65, 90])
def test_iterations(device, n_iters):
    """64 is where the way of the CPU kernel changes."""
    for shape in ((5, 6, 4), (3, 100, 9)):
        check_gradient(3 * torch.randn(shape, device=device), n_iters)


@pytest.mark.parametrize("shape", SHAPES)
def test_options(device, shape):
    for dtype in dtypes(device):
        logits = (2 * torch.randn(shape, device=device)).to(dtype)
        mask = torch.rand(shape[:-1], device=device) < 0.75
        rows, columns = (m.to(real(dtype)) for m in marginals(shape, device))
        check_gradient(logits, temperature=0.4)
        check_gradient(logits, mask=mask)
        check_gradient(logits, row_marginals=rows)
        check_gradient(logits, row_marginals=rows, col_marginals=columns, temperature=2.0)
        for tolerance in (2.0, 0.3, 0.01):
            check_gradient(logits, 6, tolerance=tolerance)
        for keep in (False, True):
            call = partial(bare, keep=keep)
            check_gradient(logits, call=call, mask=mask, row_marginals=rows)


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 100, 9)])
def test_marginals_of_zero(device, shape):
    logits = torch.randn(shape, device=device)
    rows, columns = marginals(shape, device)
    rows[..., 1] = 0
    columns[..., 2] = 0
    columns *= rows.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True)
    grad = check_gradient(logits, row_marginals=rows, col_marginals=columns)
    assert not grad[..., 1, :].any()
    logits[..., 0, :] = -torch.inf
    logits[..., 0, 2] = 1  # all that this row may have
    check_gradient(logits, row_marginals=rows, col_marginals=columns)


@pytest.mark.parametrize("shape", [(8192, 8), (1000, 64), (3, 100, 9), (40, 6, 5)])
@pytest.mark.parametrize("trap", TRAPS)
def test_trap(device, trap, shape):
    logits = trap(shape, device)
    check_gradient(logits)
    if logits.numel() < 1 << 12:
        check_gradient(logits, 3, mask=torch.rand(shape[:-1], device=device) < 0.75)
        check_gradient(logits, 70)


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 100, 9)])
def test_nothing_to_balance(device, shape):
    logits = torch.randn(shape, device=device)
    mask = torch.zeros(shape[:-1], dtype=torch.bool, device=device)
    assert not check_gradient(logits, mask=mask).any()
    mask[0] = True
    assert not check_gradient(logits, mask=mask)[1:].any()
    for empty in ((0, 4), (0, 7, 4), (2, 0, 70)):
        check_gradient(torch.randn(empty, device=device))


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 100, 9)])
def test_strides(device, shape):
    for logits in (
        torch.randn(shape, device=device).mT.contiguous().mT,
        torch.randn(shape[1:], device=device).expand(shape),
    ):
        leaf, dense = logits.requires_grad_(), logits.detach().contiguous().requires_grad_()
        grad = torch.randn(shape[1:], device=device).expand(shape)
        assert torch.equal(
            torch.autograd.grad(sinkhorn(leaf), leaf, grad)[0],
            torch.autograd.grad(sinkhorn(dense), dense, grad.contiguous())[0],
        )


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 20, 9), (3, 100, 9)])
def test_what_was_kept_or_not_gives_the_same(device, shape):
    logits = 20 * torch.randn(shape, device=device)
    grad = torch.randn_like(logits)
    for tolerance in (None, 0.05):
        found = []
        for keep in (False, True):
            leaf = logits.clone().requires_grad_()
            bare(leaf, 8, tolerance, keep=keep).backward(grad)
            found.append(leaf.grad)
        assert_close(*found, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(2, 4, 3), (2, 14, 3), (70, 2)])
def test_in_float64(shape):
    logits = (2 * torch.randn(shape, dtype=torch.float64)).requires_grad_()
    rows, columns = (m.double() for m in marginals(shape, "cpu"))
    mask = torch.ones(shape[:-1], dtype=torch.bool)
    mask[..., 1] = False
    held = columns * ((rows * mask).sum(-1, keepdim=True) / columns.sum(-1, keepdim=True))
    zero = held.clone()
    zero[..., 0] = 0
    zero *= held.sum(-1, keepdim=True) / zero.sum(-1, keepdim=True)
    for options in (
        {},
        {"temperature": 0.3},
        {"row_marginals": rows},
        {"row_marginals": rows, "col_marginals": columns},
        {"mask": mask},
        {"mask": mask, "row_marginals": rows, "col_marginals": held, "temperature": 3.0},
        {"mask": mask, "row_marginals": rows, "col_marginals": zero},
        {"tolerance": 0.1},
        {"tolerance": 2.0},
        {"n_iters": 1},
        {"n_iters": 66},
    ):
        given = {"n_iters": 4} | options
        assert gradcheck(lambda x, given=given: sinkhorn(x, **given, check=False), logits)


@pytest.mark.parametrize("shape", [(3, 5, 4), (60, 5)])
def test_far_apart_in_float64(shape):
    logits = torch.randn(shape, dtype=torch.float64)
    logits[..., 1] -= 900
    assert gradcheck(lambda x: sinkhorn(x, 4), logits.requires_grad_())


@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 80, 9), (500, 33)])
def test_implicit_is_exact_at_convergence(device, shape):
    for dtype in (torch.float32, torch.float64)[: 2 if device == "cpu" else 1]:
        leaf = torch.randn(shape, device=device).to(dtype).requires_grad_()
        mask = torch.rand(shape[:-1], device=device) < 0.8
        rows, columns = (m.to(dtype) for m in marginals(shape, device))
        columns = columns * ((rows * mask).sum(-1, keepdim=True) / columns.sum(-1, keepdim=True))
        grad = torch.randn_like(leaf)
        for options in (
            {"temperature": 0.7},
            {"mask": mask, "row_marginals": rows, "col_marginals": columns},
        ):
            plans = [sinkhorn(leaf, 300, gradient=g, **options) for g in ("exact", "implicit")]
            exact, implicit = (torch.autograd.grad(plan, leaf, grad)[0] for plan in plans)
            assert_close(*plans, rtol=0, atol=1e-6)
            bound = 1e-8 if dtype == torch.float64 else 2e-4
            assert_close(implicit, exact, rtol=0, atol=bound * exact.abs().max().item())


def test_implicit_with_forbidden_entries(device):
    """In two parts that exchange nothing, and with a row and a column of nothing."""
    logits = torch.full((2, 20, 7), -torch.inf, device=device)
    logits[:, :10, :3], logits[:, 10:19, 3:6] = 0.0, 0.0
    leaf = (logits + torch.randn_like(logits)).requires_grad_()
    columns = torch.tensor([10 / 3] * 3 + [3.0] * 3 + [0.0], device=device)
    rows = torch.ones(20, device=device)
    rows[19] = 0
    grad = torch.randn_like(leaf)
    found = []
    for gradient in ("exact", "implicit"):
        plan = sinkhorn(
            leaf, 300, row_marginals=rows, col_marginals=columns, gradient=gradient, check=False
        )
        found.append(torch.autograd.grad(plan, leaf, grad)[0])
    assert_close(*found, rtol=0, atol=1e-4 * found[0].abs().max().item())


def test_only_the_plan_is_differentiable(device):
    leaf = torch.randn(20, 5, device=device).requires_grad_()
    rows = torch.ones(20, device=device, requires_grad=True)
    for gradient in ("exact", "implicit"):
        found = sinkhorn(
            leaf, row_marginals=rows, gradient=gradient, return_scalings=True, check=False
        )
        assert [t.requires_grad for t in found] == [True, False, False, False, False]
        found.plan.square().sum().backward()
        assert leaf.grad.any() and rows.grad is None
