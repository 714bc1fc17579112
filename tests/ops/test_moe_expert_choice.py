import math

import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.moe_cases import EXPERTS, close, dtypes, equal_plans


def check(logits, capacity, **options):
    """Forward and backward against the reference.

    Which of two scores that differ by a rounding is larger is left open: there the tokens may
    differ, and the weights are held to the scores of the tokens that were chosen.
    """
    actual_in, expected_in = (logits.detach().clone().requires_grad_() for _ in range(2))
    actual = moe.expert_choice(actual_in, capacity, **options)
    expected = reference.expert_choice(expected_in, capacity, **options)
    close(actual.threshold, expected.threshold)
    real = expected.weights.dtype
    scores = expected_in.to(real).softmax(-1)
    used = actual.tokens >= 0
    weights = scores.T.gather(1, actual.tokens.clamp(min=0).long()).masked_fill(~used, 0)
    close(actual.weights, weights)

    n_groups = options.get("n_groups", 1)
    chosen, wanted = (
        torch.zeros_like(scores.T).scatter_add_(
            1, r.tokens.clamp(min=0).long(), (r.tokens >= 0).to(real)
        )
        for r in (actual, expected)
    )
    assert chosen.max() <= 1 or not chosen.numel()
    lowest = expected.threshold.repeat_interleave(len(logits) // n_groups, 0).T
    doubtful = (scores.T - lowest).abs() <= 1e-5 * lowest
    assert torch.equal(chosen[~doubtful], wanted[~doubtful])
    assert torch.equal(used.sum(1), (expected.tokens >= 0).sum(1))

    upstream = torch.randn_like(actual.weights)
    (actual.weights * upstream).sum().backward()
    (weights * upstream).sum().backward()
    close(actual_in.grad, expected_in.grad)
    return actual


def random_logits(n_tokens, n_experts, device, dtype=torch.float32):
    return torch.randn(n_tokens, n_experts, device=device).to(dtype)


@pytest.mark.parametrize("n_experts", EXPERTS)
def test_every_number_of_experts(device, n_experts):
    for n_tokens, capacity, n_groups in [(1, 1, 1), (40, 7, 1), (60, 11, 3), (260, 60, 2)]:
        check(random_logits(n_tokens, n_experts, device), capacity, n_groups=n_groups)


def test_every_dtype(device):
    for dtype in dtypes(device):
        # in half precision many scores tie: the lower token goes first
        check(random_logits(48, 10, device, dtype), 9, n_groups=2)


@pytest.mark.parametrize("capacity", [0, 1, 19, 20])
def test_every_capacity(device, capacity):
    check(random_logits(40, 6, device), capacity, n_groups=2)


def test_long_columns(device):
    logits = random_logits(20000, 3, device)
    result = check(logits, 2500, n_groups=2)
    assert (result.tokens.view(3, 2, 2500).diff(dim=-1) > 0).all()


def test_mask_and_too_few_tokens(device):
    logits = random_logits(40, 5, device)
    mask = torch.rand(40, device=device) > 0.6
    result = check(logits, 12, n_groups=2, mask=mask)
    assert (result.tokens == -1).any() and (result.threshold == 0).any()
    assert mask[result.tokens[result.tokens >= 0].long()].all()
    check(logits, 4, mask=torch.zeros_like(mask))


def test_ties_go_to_the_lower_token(device):
    result = check(torch.zeros(9, 4, device=device), 3)
    assert result.tokens.tolist() == [[0, 1, 2]] * 4


@pytest.mark.parametrize("n_tokens", [700, 3000, 20000])
def test_many_ties(device, n_tokens):
    logits = torch.zeros(n_tokens, 2, device=device)
    logits[:, 0] = torch.randint(0, 5, (n_tokens,), device=device)
    mask = torch.rand(n_tokens, device=device) > 0.1
    expected = reference.expert_choice(logits, n_tokens // 3, mask=mask)
    result = moe.expert_choice(logits, n_tokens // 3, mask=mask)
    assert torch.equal(result.tokens, expected.tokens)


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.mem_get_info()[1] < 30e9, reason="needs 30 GB"
)
def test_almost_2_to_the_31_tokens():
    logits = torch.zeros(2**31 - 100, 1, dtype=torch.bfloat16, device="cuda")
    assert moe.expert_choice(logits, 2).tokens.tolist() == [[0, 1]]


def test_no_token(device):
    result = moe.expert_choice(torch.empty(0, 4, device=device), 0)
    assert result.tokens.shape == (4, 0)
    assert (result.threshold == 0).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_never_give_a_wrong_token(device, bad):
    logits = torch.randn(50, 6, device=device)
    logits[torch.rand_like(logits) < 0.3] = bad
    tokens = moe.expert_choice(logits, 20).tokens
    assert (tokens >= 0).all() and (tokens < 50).all()
    assert all(len(row.unique()) == 20 for row in tokens)


def test_strided_logits(device):
    logits = random_logits(60, 30, device)
    check(logits[:, 2:12], 5)
    check(logits[::2], 5)
    check(logits.T.contiguous().T, 5)


def test_gradient_in_float64():
    logits = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe.expert_choice(x, 2, n_groups=2).weights, logits)


def test_round_trip_through_a_plan(device):
    x = torch.randn(60, 24, device=device)
    chosen = moe.expert_choice(random_logits(60, 7, device), 5, n_groups=3)
    plan = moe.plan_from_tokens(chosen.tokens, 60)
    equal_plans(plan, reference.plan_from_tokens(chosen.tokens, 60))
    y = moe.combine(moe.dispatch(x, plan), plan, chosen.weights)
    total = torch.zeros(60, device=device).index_add_(
        0, chosen.tokens.flatten().long(), chosen.weights.flatten()
    )
    close(y, x * total[:, None])


@pytest.mark.parametrize("n_tokens", [0, 1, 5, 1500])
@pytest.mark.parametrize("shape", [(1, 0), (1, 1), (3, 40), (200, 7)])
def test_plan_from_any_tokens(device, n_tokens, shape):
    """Unsorted, repeated and missing tokens."""
    tokens = torch.randint(-1, max(n_tokens, 1), shape, device=device, dtype=torch.int32)
    if n_tokens == 0:
        tokens.fill_(-1)
    equal_plans(
        moe.plan_from_tokens(tokens, n_tokens), reference.plan_from_tokens(tokens, n_tokens)
    )
