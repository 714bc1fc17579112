"""sinkhorn against the float64 reference."""

import pytest
import torch
from torch.testing import assert_close

from sparsemoe.ops.sinkhorn import sinkhorn
from sparsemoe.reference.sinkhorn import sinkhorn as reference
from tests.ops.sinkhorn_cases import PLAN, TRAPS, check, dtypes, marginals, real

TOKENS = [1, 2, 5, 31, 64, 65, 200, 1000]
EXPERTS = [1, 3, 4, 8, 17, 64, 100, 256, 1024]
SHAPES = [(4096, 64), (8192, 8), (3, 100, 9), (40, 6, 5), (2, 20, 1), (3, 5, 40)]


@pytest.mark.parametrize("n_experts", EXPERTS)
@pytest.mark.parametrize("n_tokens", TOKENS)
def test_size(device, n_tokens, n_experts):
    leading = (3,) if n_tokens * n_experts < 1 << 16 else ()
    check(2 * torch.randn(*leading, n_tokens, n_experts, device=device), n_iters=4)


@pytest.mark.parametrize("shape", [(33, 7), (1, 4, 4), (2, 3, 70, 9), (2, 1, 3, 9, 6)])
def test_dtype(device, shape):
    for dtype in dtypes(device):
        check((2 * torch.randn(shape, device=device)).to(dtype))


@pytest.mark.parametrize("shape", [(0, 4), (3, 0, 5), (0, 7, 4), (2, 0, 70, 9)])
@pytest.mark.parametrize("tolerance", [None, 0.1])
def test_nothing(device, shape, tolerance):
    found = check(torch.randn(shape, device=device), tolerance=tolerance)
    assert found.plan.shape == shape and not found.log_v.any()


@pytest.mark.parametrize("n_tokens", [6, 40])
def test_strides(device, n_tokens):
    wide = torch.randn(50, 60, 80, device=device)
    for logits in (
        wide[:3, :n_tokens, 3:12],
        wide[:3, :12, :n_tokens].mT,
        wide[:n_tokens, :7, :4].transpose(0, 1),
        wide[:1, :n_tokens, :5].expand(4, n_tokens, 5),
        wide[0, ::2, ::5][:n_tokens],
    ):
        assert not logits.is_contiguous()
        assert_close(check(logits).plan, sinkhorn(logits.contiguous()), rtol=0, atol=1e-6)


@pytest.mark.parametrize("n_iters", [1, 2, 3, 20, 70])
def test_iterations(device, n_iters):
    for shape in ((5, 6, 4), (3, 100, 9)):
        check(3 * torch.randn(shape, device=device), n_iters)


@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_temperature(device, temperature):
    for shape in ((5, 6, 4), (3, 100, 9)):
        check(torch.randn(shape, device=device), temperature=temperature)


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 100, 9), (2, 700, 64)])
def test_marginals(device, shape):
    for dtype in dtypes(device):
        logits = torch.randn(shape, device=device).to(dtype)
        rows, columns = (m.to(real(dtype)) for m in marginals(shape, device))
        of_ones = columns * (shape[-2] / columns.sum(-1, keepdim=True))
        check(logits, row_marginals=rows)
        check(logits, row_marginals=rows, col_marginals=columns)
        check(logits, col_marginals=of_ones)
        for_all = {"row_marginals": rows[0], "col_marginals": columns[0]}
        plan = sinkhorn(logits, **{k: m.expand(shape[0], -1) for k, m in for_all.items()})
        assert_close(check(logits, **for_all).plan, plan, rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 100, 9)])
def test_marginals_of_zero(device, shape):
    logits = torch.randn(shape, device=device)
    rows, columns = marginals(shape, device)
    rows[..., 1] = 0
    columns[..., 2] = 0
    columns *= rows.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True)
    found = check(logits, row_marginals=rows, col_marginals=columns)
    assert not found.plan[..., 1, :].any() and not found.plan[..., 2].any()
    # A row that is left without a column, and a column that is left without a row.
    logits[..., 0, :] = -torch.inf
    logits[..., 0, 2] = 1
    check(logits, row_marginals=rows, col_marginals=columns)
    logits[..., 1:, 2] = -torch.inf
    for n_iters in (1, 2, 3):
        check(logits, n_iters, row_marginals=rows, col_marginals=columns)


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 100, 9), (4096, 64)])
def test_mask(device, shape):
    logits = torch.randn(shape, device=device)
    mask = torch.rand(shape[:-1], device=device) < 0.75
    found = check(logits, mask=mask)
    assert not found.plan[~mask].any()
    assert_close(found.plan.sum((-2, -1)), mask.sum(-1).float())
    # What stands in masked rows is of no account.
    other = torch.where(mask[..., None], logits, torch.nan)
    assert_close(sinkhorn(other, mask=mask, check=False), found.plan, rtol=0, atol=1e-6)
    rows, columns = marginals(shape, device)
    columns *= (rows * mask).sum(-1, keepdim=True) / columns.sum(-1, keepdim=True)
    check(logits, mask=mask, row_marginals=rows, col_marginals=columns)


@pytest.mark.parametrize("shape", [(5, 6, 4), (3, 100, 9)])
def test_everything_masked(device, shape):
    mask = torch.ones(shape[:-1], dtype=torch.bool, device=device)
    mask[1] = False
    for tolerance in (None, 0.0, 0.1):
        found = check(torch.randn(shape, device=device), mask=mask, tolerance=tolerance)
        assert not found.plan[1].any() and not found.log_v[1].any() and found.error[1] == 0
        assert found.plan[0].any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("trap", TRAPS)
def test_trap(device, trap, shape):
    if shape[-1] == 1 and "column" in trap.__name__:
        return
    logits = trap(shape, device)
    check(logits)
    if logits.numel() < 1 << 12:
        check(logits, 40)
        for dtype in dtypes(device):
            check(logits.to(dtype), 5)
        check(logits, mask=torch.rand(shape[:-1], device=device) < 0.75)


@pytest.mark.parametrize("shape", [(4, 12, 2), (2, 60, 2), (2000, 2)])
def test_scalings_that_leave_the_range_of_float32_by_and_by(device, shape):
    """All rows but a light one want the same column: the other's scaling grows by the same factor
    in each iteration, until it makes up for e^-110."""
    logits = torch.randn(shape, device=device)
    logits[..., 1:, 0] += 110
    logits[..., 0, 1] += 110
    rows = torch.ones(shape[:-1], device=device)
    rows[..., 0] = 1e-3
    for n_iters in range(1, 24):
        check(logits, n_iters, row_marginals=rows)


def test_traps_side_by_side(device):
    """Problems of a batch do not disturb each other, and hardly know of each other."""
    for shape in ((4, 4), (40, 9)):
        logits = torch.stack([trap(shape, device) for trap in TRAPS])
        found = check(logits, 20)
        for one, plan in zip(logits, found.plan, strict=True):
            assert_close(
                sinkhorn(one, 20, check=False), plan, rtol=0, atol=PLAN[device, plan.dtype]
            )


@pytest.mark.parametrize("shape, n_iters", [((5000, 4, 4), 20), ((301, 7, 3), 20), ((99, 8, 8), 9)])
def test_many_small_matrices(device, shape, n_iters):
    for scale in (1, 4):
        check(scale * torch.randn(shape, device=device), n_iters)
    check(torch.randn(shape, device=device), n_iters, tolerance=0.01)


def errors(logits, n_iters, **options):
    """[n_iters + 1, ...]: the reference's errors after 0, 1, .. iterations."""
    return torch.stack(
        [
            reference(logits.double(), n, return_scalings=True, **options).error
            for n in range(n_iters + 1)
        ]
    )


@pytest.mark.parametrize("shape", [(7, 6, 4), (4, 100, 9), (2, 1000, 64)])
def test_tolerance(device, shape):
    """Tolerances halfway between the last problem's errors after n and n + 1 iterations."""
    scale = torch.linspace(0.3, 3, shape[0], device=device).view(-1, 1, 1)
    for dtype in dtypes(device):
        logits = (scale * torch.randn(shape, device=device)).to(dtype)
        every = errors(logits, 12)
        last = every[:, -1]
        ended = set()
        for n in range(12):
            tolerance = (last[n] * last[n + 1]).sqrt().item()
            if tolerance < 1e-4 or ((every / tolerance).log().abs() < 0.01).any():
                continue
            found = check(logits, 12, tolerance=tolerance)
            assert found.iterations[-1] == n + 1
            assert (found.error[found.iterations < 12] <= tolerance).all()
            ended |= set(found.iterations.tolist())
        assert len(ended) > 1


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 100, 9), (4096, 64)])
def test_a_tolerance_that_is_met_at_once(device, shape):
    found = check(torch.randn(shape, device=device), tolerance=2.0)
    assert not found.iterations.any() and not found.log_v.any()
    assert_close(found.plan, torch.softmax(torch.zeros_like(found.plan), -1), rtol=1, atol=1)
    same = check(torch.zeros(shape, device=device), tolerance=1e-5)
    assert not same.iterations.any()


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 100, 9)])
def test_a_tolerance_that_is_not_met(device, shape):
    logits = 3 * torch.randn(shape, device=device)
    found = check(logits, 3, tolerance=1e-9)
    assert (found.iterations == 3).all()
    assert_close(found.plan, sinkhorn(logits, 3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 100, 9)])
def test_error_is_of_the_plan_or_is_not_measured(device, shape):
    logits = 3 * torch.randn(shape, device=device)
    plan, *unmeasured, state, _ = torch.ops.sparsemoe.sinkhorn(logits, 5)
    assert [t.shape for t in unmeasured] == [(0,)] * 3 and (state[..., 0] == 5).all()
    found = sinkhorn(logits, 5, return_scalings=True)
    assert_close(found.plan, plan, rtol=0, atol=1e-6)
    wrong = (plan.double().sum(-2) - shape[-2] / shape[-1]).abs().sum(-1) / shape[-2]
    assert_close(found.error.double(), wrong, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 6, 4), (2, 100, 9), (700, 64)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_spreads(device, shape, value):
    logits = torch.randn(shape, device=device)
    logits[..., 2, 1] = value
    for tolerance in (None, 0.1):
        found = sinkhorn(logits, 20, tolerance, return_scalings=True)
        assert found.plan.isnan().all() and (found.iterations == 20).all()
    if len(shape) > 2:  # within its problem
        logits[1:] = 0
        found = sinkhorn(logits, 20)
        assert found[0].isnan().all() and found[1:].isfinite().all()
    marginals = torch.ones(shape[:-1], device=device)
    marginals[..., 0] = torch.nan
    assert (
        sinkhorn(torch.randn(shape, device=device), row_marginals=marginals, check=False)
        .isnan()
        .all()
    )


def test_forbidden_rows_are_refused(device):
    logits = torch.randn(2, 5, 4, device=device)
    logits[1, 3] = -torch.inf
    message = r"logits must allow every token an expert, got only -inf in row \[1, 3\]"
    with pytest.raises(ValueError, match=message):
        sinkhorn(logits, check=True)
    if device == "cpu":
        with pytest.raises(ValueError, match=message):
            sinkhorn(logits)
    plan = check(logits).plan  # the bare op's: zeros
    assert not plan[1, 3].any() and plan[1, 2].any()
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[1, 3] = False
    assert torch.equal(
        sinkhorn(logits, mask=mask, check=True)[1, 3], torch.zeros_like(logits[0, 0])
    )


@pytest.mark.parametrize("n_threads", [1, 2])
def test_same_bits_for_any_number_of_threads(n_threads):
    logits = torch.randn(3000, 40)
    before = torch.get_num_threads()
    plans = []
    for threads in (n_threads, 3):
        torch.set_num_threads(threads)
        leaf = logits.clone().requires_grad_()
        plan = sinkhorn(leaf)
        plan.backward(logits)
        plans.append((plan.detach(), leaf.grad))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*plans, strict=True))
