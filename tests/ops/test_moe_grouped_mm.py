import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.expert_cases import DTYPES, RAGGED, near, poisoned_memory
from tests.ops.moe_cases import HALVES

# [in, out] around the tiles of the GPU's kernels, and widths that no library kernel takes.
SIZES = [(64, 256), (72, 264), (200, 136), (8, 8), (37, 29), (1, 3), (130, 5)]


def offsets_of(counts, device):
    return torch.tensor([0, *counts], device=device).cumsum(0).int()


def matrices(n_experts, n_in, n_out, device, dtype, by_column):
    """[E, in, out], contiguous or the transpose of a contiguous stack, as a layer's weights are."""
    b = torch.randn(n_experts, n_in, n_out, device=device).to(dtype) * n_in**-0.5
    return (b.mT.contiguous().mT if by_column else b).requires_grad_()


def check(a, b, offsets, upstream=None):
    """y and both gradients against the reference in float64."""
    dtype = a.dtype
    exact_a, exact_b = (t.detach().double().requires_grad_() for t in (a, b))
    y = moe.grouped_mm(a, b, offsets)
    expected = reference.grouped_mm(exact_a, exact_b, offsets)
    expected = expected + 0 * (exact_a.sum() + exact_b.sum())  # also where there is no expert
    assert y.dtype == dtype
    near("y", y, expected, dtype)
    assert (y[int(offsets[-1]) :] == 0).all()
    if upstream is None:
        upstream = torch.randn(y.shape, device=y.device).to(dtype)
    grads = torch.autograd.grad(y, (a, b), upstream, retain_graph=True)
    wanted = torch.autograd.grad(expected, (exact_a, exact_b), upstream.double())
    for name, actual, w in zip("ab", grads, wanted, strict=True):
        near(name, actual, w, dtype)
    again = torch.autograd.grad(y, (a, b), upstream)
    assert all(torch.equal(p, q) for p, q in zip(grads, again, strict=True))
    return grads


def rows(n, width, device, dtype):
    return torch.randn(n, width, device=device).to(dtype).requires_grad_()


@pytest.mark.parametrize("n_in, n_out", SIZES)
@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_experts(device, dtype, by_column, n_in, n_out):
    a = rows(sum(RAGGED), n_in, device, dtype)
    b = matrices(len(RAGGED), n_in, n_out, device, dtype, by_column)
    _, grad_b = check(a, b, offsets_of(RAGGED, device))
    if min(n_in, n_out) > 1:
        assert grad_b.stride() == b.stride()


@pytest.mark.parametrize(
    "counts, n_rows",
    [([], 5), ([0], 0), ([0, 0], 3), ([1], 1), ([900, 4], 910), ([0, 300, 300, 0], 600)],
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_counts(device, dtype, counts, n_rows):
    """No expert, no row, rows of no expert, one expert with nearly all."""
    a = rows(n_rows, 40, device, dtype)
    check(a, matrices(len(counts), 40, 24, device, dtype, False), offsets_of(counts, device))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_past_the_end_are_zero_in_poisoned_memory(device, dtype):
    """And what stands in such rows is not read."""
    a = rows(200, 40, device, dtype)
    with torch.no_grad():
        a[140:] = torch.nan
    b = matrices(4, 40, 24, device, dtype, True)
    offsets = offsets_of([100, 0, 39, 1], device)
    upstream = torch.randn(200, 24, device=device).to(dtype)
    upstream[140:] = torch.nan
    with poisoned_memory():
        y = moe.grouped_mm(a, b, offsets)
        grad_a, grad_b = torch.autograd.grad(y, (a, b), upstream)
    assert y.isfinite().all() and grad_a.isfinite().all() and grad_b.isfinite().all()
    assert (y[140:] == 0).all() and (grad_a[140:] == 0).all() and (grad_b[1] == 0).all()
    expected = a.detach()[:100].double() @ b.detach()[0].double()
    near("y", y[:100], expected, dtype)


@pytest.mark.parametrize("width", [5, 40, 80, 136])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_row_stays_alone(device, dtype, width):
    a, b = rows(60, width, device, dtype), matrices(2, width, 64, device, dtype, True)
    offsets = offsets_of([40, 20], device)
    clean = moe.grouped_mm(a, b, offsets)
    with torch.no_grad():
        a[3], a[41] = torch.nan, torch.inf
    y = moe.grouped_mm(a, b, offsets)
    others = [r for r in range(60) if r not in (3, 41)]
    assert torch.equal(y[others], clean[others]) and y[3].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_inputs(device, dtype):
    offsets = offsets_of([30, 0, 50], device)
    wide = torch.randn(200, 120, device=device).to(dtype)
    stack = torch.randn(3, 60, 90, device=device).to(dtype)
    for a in (wide[:80, 7:47], wide[:160:2, :40], wide.T[:80, :40], wide[:1, :40].expand(80, 40)):
        for b in (
            stack[:, :40, 3:59],
            stack[:, ::2, :][:, :20].repeat(1, 2, 1)[:, :, ::2],
            stack.mT[:, :40, :56],
            stack[:1, :40, :56].expand(3, 40, 56),
            stack.permute(1, 0, 2)[:3, :3, :40].permute(0, 2, 1).repeat(1, 1, 9),
        ):
            check(a.detach().requires_grad_(), b.detach().requires_grad_(), offsets)


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_gradients(device, dtype):
    a, b = rows(80, 40, device, dtype), matrices(3, 40, 24, device, dtype, True)
    offsets = offsets_of([30, 0, 50], device)
    ones = torch.ones((), device=device, dtype=dtype)
    check(a, b, offsets, ones.expand(80, 24))
    check(a, b, offsets, torch.randn(24, device=device).to(dtype).expand(80, 24))
    check(a, b, offsets, torch.randn(24, 80, device=device).to(dtype).T)


@pytest.mark.parametrize("dtype", HALVES)
def test_sums_are_float32(device, dtype):
    """1 + 4096 * 2^-12 is lost step by step in half precision."""
    a = torch.full((2, 4097), 2.0**-12, device=device, dtype=dtype)
    a[:, 0] = 1
    b = torch.ones(1, 4097, 8, device=device, dtype=dtype)
    y = moe.grouped_mm(a, b, offsets_of([2], device))
    assert (y == 2).all()
    offsets = offsets_of([4097], device)
    column = a[0, :, None].expand(4097, 8).contiguous()
    b = torch.zeros(1, 8, 8, device=device, dtype=dtype, requires_grad=True)
    moe.grouped_mm(column, b, offsets).sum().backward()
    assert (b.grad == 2).all()


@pytest.mark.parametrize("by_column", [False, True])
def test_both_derivatives_in_float64(by_column):
    a, b = rows(9, 3, "cpu", torch.float64), matrices(3, 3, 2, "cpu", torch.float64, by_column)
    offsets = offsets_of([4, 0, 3], "cpu")
    assert torch.autograd.gradcheck(lambda a, b: moe.grouped_mm(a, b, offsets), (a, b))
    assert torch.autograd.gradgradcheck(lambda a, b: moe.grouped_mm(a, b, offsets), (a, b))


def test_only_what_is_wanted(device):
    a, b = torch.randn(10, 8, device=device), torch.randn(2, 8, 8, device=device)
    offsets = offsets_of([4, 5], device)
    for wanted in (a, b):
        wanted.requires_grad_()
        moe.grouped_mm(a, b, offsets).sum().backward()
        wanted.requires_grad_(False)
    assert a.grad is not None and b.grad is not None


def test_experts_from_their_parts(device):
    """dispatch, grouped_mm and combine give what experts gives."""
    chosen = torch.randint(-1, 4, (50, 2), dtype=torch.int32, device=device)
    plan = moe.plan(chosen, 4, capacity=20)
    weights = torch.rand(50, 2, device=device)
    x = torch.randn(50, 24, device=device)
    up, down = torch.randn(4, 32, 24, device=device), torch.randn(4, 24, 32, device=device)
    hidden = moe.grouped_mm(moe.dispatch(x, plan), up.mT, plan.offsets)
    parts = moe.grouped_mm(torch.relu(hidden).square(), down.mT, plan.offsets)
    y = moe.combine(parts, plan, weights)
    near("y", moe.experts(x, up, down, plan, weights, "relu2"), y, torch.float32)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_wrong_offsets_do_no_harm_on_a_gpu(dtype):
    """They are clamped to the rows: nothing is read or written out of bounds."""
    a, b = rows(300, 72, "cuda", dtype), matrices(3, 72, 136, "cuda", dtype, True)
    for values in ([-(2**30), 100, 200, 2**30], [2**30] * 4, [-5] * 4):
        offsets = torch.tensor(values, dtype=torch.int32, device="cuda")
        y = moe.grouped_mm(a, b, offsets)
        torch.autograd.grad(y.float().sum(), (a, b))
    torch.cuda.synchronize()
