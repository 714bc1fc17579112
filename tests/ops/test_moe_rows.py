"""dispatch and combine."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.moe_cases import TOKENS, WIDTHS, close, dtypes, routed


def plans(n_tokens, n_experts, top_k, device):
    """A plan of each kind, with weights."""
    experts, weights = routed(n_tokens, n_experts, top_k, device, skew=1.0)
    yield moe.plan(experts, n_experts), weights
    yield moe.plan(experts, n_experts, capacity=max(1, n_tokens // n_experts)), weights
    experts = experts.clone()
    experts[torch.rand(experts.shape, device=device) < 0.3] = -1
    yield moe.plan(experts, n_experts), weights
    logits = torch.randn(n_tokens, n_experts, device=device)
    mask = torch.rand(n_tokens, device=device) > 0.5
    chosen = moe.expert_choice(logits, n_tokens // 3, mask=mask)
    yield moe.plan_from_tokens(chosen.tokens, n_tokens), chosen.weights


def check(x, plan, weights):
    dtype = x.dtype
    real = torch.float64 if dtype == torch.float64 else torch.float32
    weights = weights.to(real)
    actual_x, expected_x = (x.detach().clone().requires_grad_() for _ in range(2))
    rows, expected_rows = moe.dispatch(actual_x, plan), reference.dispatch(expected_x, plan)
    assert torch.equal(rows, expected_rows)
    upstream = torch.randn_like(rows)
    rows.backward(upstream)
    expected_grad = reference.combine(upstream, plan)
    close(actual_x.grad, expected_grad)

    values = torch.randn(rows.shape, device=x.device).to(dtype)
    for scale in (weights, None):
        actual_rows, expected_rows = (values.clone().requires_grad_() for _ in range(2))
        w = [None if scale is None else scale.clone().requires_grad_() for _ in range(2)]
        y, expected = (
            moe.combine(actual_rows, plan, w[0]),
            reference.combine(expected_rows, plan, w[1]),
        )
        assert y.dtype == dtype
        close(y, expected)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        expected.backward(upstream)
        close(actual_rows.grad, expected_rows.grad)
        if scale is not None:
            width = max(1, x.shape[1])
            close(w[0].grad / width**0.5, w[1].grad / width**0.5, dtype)


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width(device, width):
    for dtype in dtypes(device):
        for plan, weights in plans(33, 5, 3, device):
            check(torch.randn(33, width, device=device).to(dtype), plan, weights)


@pytest.mark.parametrize("n_tokens", TOKENS)
def test_every_number_of_tokens(device, n_tokens):
    for plan, weights in plans(n_tokens, 4, 2, device):
        check(torch.randn(n_tokens, 48, device=device), plan, weights)


@pytest.mark.parametrize("top_k", [1, 9, 32])
def test_every_number_of_choices(device, top_k):
    for plan, weights in plans(40, 70, top_k, device):
        check(torch.randn(40, 72, device=device), plan, weights)


def test_a_token_that_every_expert_chose(device):
    tokens = torch.zeros(100, 1, dtype=torch.int32, device=device)
    plan = moe.plan_from_tokens(tokens, 3)
    check(torch.randn(3, 64, device=device), plan, torch.rand(100, 1, device=device))


@pytest.mark.parametrize("width", [4096, 8192])
def test_wide_rows(device, width):
    for plan, weights in plans(20, 6, 2, device):
        check(torch.randn(20, width, device=device).to(torch.bfloat16), plan, weights)


@pytest.mark.parametrize(
    "n_tokens, width, dtype",
    [
        (2000, 520, torch.float32),
        (4300, 520, torch.float32),
        (8200, 520, torch.float32),
        (26000, 3, torch.bfloat16),
        (32000, 132, torch.float32),
        (16000, 2056, torch.bfloat16),
    ],
)
def test_many_tokens(device, n_tokens, width, dtype):
    """Sizes for which a GPU takes another grid each."""
    if device == "cpu" and n_tokens > 2000:
        pytest.skip("for a GPU")
    x = torch.randn(n_tokens, width, device=device).to(dtype)
    for plan, weights in plans(n_tokens, 4, 2, device):
        used = plan.row_token >= 0
        expected = torch.where(used[:, None], x[plan.row_token.clamp(min=0).long()], 0)
        assert torch.equal(moe.dispatch(x, plan), expected)
        pair = plan.row_pair.clamp(min=0).long()
        scaled = expected.float() * torch.where(used, weights.flatten()[pair], 0)[:, None]
        total = torch.zeros(n_tokens, width, device=device)
        total.index_add_(0, plan.row_token.clamp(min=0), scaled)
        close(moe.combine(expected, plan, weights), total.to(dtype))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_threads_that_dispatch_at_the_same_time():
    """Sizes whose kernels take different amounts of shared memory."""
    cases = []
    for n_tokens, width in ((32000, 132), (8200, 520)):
        plan = moe.plan(torch.randint(0, 4, (n_tokens, 1), dtype=torch.int32, device="cuda"), 4)
        x = torch.randn(n_tokens, width, device="cuda")
        cases.append((x, plan, x[plan.row_token.long()]))

    def repeat(x, plan, expected):
        return sum(torch.equal(moe.dispatch(x, plan), expected) for _ in range(200)) == 200

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda case: repeat(*case), cases * 2))


def test_strided_inputs(device):
    experts, weights = routed(30, 6, 2, device)
    plan = moe.plan(experts, 6)
    wide = torch.randn(60, 200, device=device)
    for x in (wide[:30, 5:69], wide[::2, :64], wide.T[:30, :60], wide[:1, :64].expand(30, 64)):
        assert torch.equal(moe.dispatch(x, plan), reference.dispatch(x, plan))
    for rows in (wide[:, 5:69], wide[:, :128:2], wide[:1, :64].expand(60, 64)):
        close(moe.combine(rows, plan, weights), reference.combine(rows, plan, weights))
    rows = torch.randn(60, 64, device=device, requires_grad=True)
    moe.combine(rows, plan, weights).sum().backward()  # an expanded gradient
    close(rows.grad, weights.flatten()[plan.row_pair.long()][:, None].expand(60, 64))


def test_rows_without_token_are_zero_and_never_read(device):
    experts = torch.tensor([[0, -1], [-1, -1], [1, 0]], dtype=torch.int32, device=device)
    plan = moe.plan(experts, 2)
    rows = moe.dispatch(torch.ones(3, 8, device=device), plan)
    assert rows.sum(-1).tolist() == [8, 8, 8, 0, 0, 0]
    rows[3:] = torch.nan
    weights = torch.ones(3, 2, device=device, requires_grad=True)
    rows.requires_grad_()
    y = moe.combine(rows, plan, weights)
    assert y.sum(-1).tolist() == [8, 0, 16]
    y.sum().backward()
    assert weights.grad.tolist() == [[8, 0], [0, 0], [8, 8]]
    assert rows.grad.sum(-1).tolist() == [8, 8, 8, 0, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nan_and_infinity_stay_what_they_are(device, dtype):
    experts, weights = routed(12, 6, 2, device)
    weights[3, 1] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # all ones
    weights[5, 0] = torch.inf
    plan = moe.plan(experts, 6)
    rows = torch.rand(24, 37, device=device).to(dtype) + 1
    y = moe.combine(rows, plan, weights)
    assert y[3].isnan().all() and (y[5] == torch.inf).all()
    others = [t for t in range(12) if t not in (3, 5)]
    assert y[others].isfinite().all()


def test_a_row_or_token_out_of_range_is_none(device):
    """In a plan that was not made by plan(): nothing is read or written out of bounds."""
    plan = moe.plan(torch.tensor([[0], [1], [1]], dtype=torch.int32, device=device), 2)
    big = 2**30
    plan.row_token[2], plan.token_rows[2, 0] = big, big
    rows = moe.dispatch(torch.ones(3, 8, device=device), plan)
    assert rows.sum(-1).tolist() == [8, 8, 0]
    weights = torch.ones(3, 1, device=device, requires_grad=True)
    y = moe.combine(torch.ones(3, 8, device=device, requires_grad=True), plan, weights)
    assert y.sum(-1).tolist() == [8, 8, 0]
    y.sum().backward()
    assert weights.grad.flatten().tolist() == [8, 8, 0]


def test_a_pair_or_offset_out_of_range_is_none(device):
    tokens = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device=device)
    plan = moe.plan_from_tokens(tokens, 3)
    plan.token_offsets[0], plan.token_offsets[3] = -(2**30), 2**30
    x = torch.ones(3, 8, device=device)
    assert moe.dispatch(x, plan).sum(-1).tolist() == [8, 8, 8, 8]
    for pair in (2**30, -1):
        plan.row_pair[0] = pair
        weights = torch.ones(2, 2, device=device, requires_grad=True)
        rows = torch.ones(4, 8, device=device, requires_grad=True)
        y = moe.combine(rows, plan, weights)
        assert y.sum(-1).tolist() == [0, 16, 8]
        y.sum().backward()
        assert weights.grad.tolist() == [[0, 8], [8, 8]]
        assert rows.grad.sum(-1).tolist() == [0, 8, 8, 8]


def test_sums_are_float32(device):
    """1 + 31 * 2^-9 is lost step by step in bfloat16 and kept in float32."""
    experts = torch.arange(32, device=device, dtype=torch.int32)[None]
    plan = moe.plan(experts, 32)
    rows = torch.full((32, 8), 2.0**-9, device=device, dtype=torch.bfloat16)
    rows[0] = 1
    y = moe.combine(rows, plan)
    assert (y == torch.tensor(1 + 31 * 2.0**-9).to(torch.bfloat16).to(device)).all()


def test_gradient_in_float64():
    experts, weights = routed(5, 4, 2, "cpu")
    logits = torch.randn(5, 4)
    chosen = moe.expert_choice(logits, 2)
    for plan, w in (
        (moe.plan(experts, 4, capacity=2), weights),
        (moe.plan_from_tokens(chosen.tokens, 5), chosen.weights),
    ):
        x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
        rows = torch.randn(plan.row_token.numel(), 3, dtype=torch.float64, requires_grad=True)
        w = w.double().requires_grad_()
        assert torch.autograd.gradcheck(lambda x, p=plan: moe.dispatch(x, p), x)
        assert torch.autograd.gradcheck(lambda r, w, p=plan: moe.combine(r, p, w), (rows, w))
        assert torch.autograd.gradcheck(lambda r, p=plan: moe.combine(r, p), rows)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 30e9, reason="needs 30 GB"
)
def test_more_than_2_to_the_31_elements():
    n_tokens, width, top_k = 550_000, 2048, 2  # rows: 2.25e9 elements, 4.5 GB
    experts = torch.randint(0, 2, (n_tokens, 1), device="cuda", dtype=torch.int32)
    experts = torch.cat([experts, 1 - experts], dim=1)
    plan = moe.plan(experts, 2)
    x = torch.randn(n_tokens, width, device="cuda", dtype=torch.bfloat16)
    rows = moe.dispatch(x, plan)
    assert rows.numel() > 2**31
    assert torch.equal(rows[-1], x[plan.row_token[-1].long()])
    assert torch.equal(rows[n_tokens + 7], x[plan.row_token[n_tokens + 7].long()])
    weights = torch.full((n_tokens, top_k), 0.5, device="cuda")
    assert torch.equal(moe.combine(rows, plan, weights), x)
    grad_rows, grad_weights = torch.ops.sparsemoe.combine_backward(
        x, rows, weights, plan.row_token, plan.row_pair, plan.token_rows, None
    )
    assert torch.equal(grad_rows[-1], rows[-1] / 2)
    close(grad_weights[-1], x[-1].float().square().sum().expand(2))
