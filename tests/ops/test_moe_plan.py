import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.moe_cases import EXPERTS, equal_plans, routed


@pytest.mark.parametrize("n_experts", EXPERTS)
def test_dropless(device, n_experts):
    for n_tokens in (0, 1, 4, 33, 700):
        for top_k in sorted({1, min(3, n_experts), min(8, n_experts)}):
            experts, _ = routed(n_tokens, n_experts, top_k, device)
            plan = moe.plan(experts, n_experts)
            equal_plans(plan, reference.plan(experts, n_experts))
            assert plan.offsets[-1] == n_tokens * top_k


@pytest.mark.parametrize("policy", ["order", "weight"])
@pytest.mark.parametrize("capacity", [0, 1, 5, 40, 10_000])
@pytest.mark.parametrize("n_experts", [1, 7, 64, 300, 1024])
def test_capacity(device, n_experts, capacity, policy):
    top_k = min(3, n_experts)
    experts, weights = routed(333, n_experts, top_k, device, skew=2.0)
    plan = moe.plan(experts, n_experts, capacity=capacity, drop_policy=policy, weights=weights)
    equal_plans(plan, reference.plan(experts, n_experts, capacity, policy, weights))
    assert (plan.offsets.diff() <= capacity).all()


@pytest.mark.parametrize("capacity", [None, 0, 1, 3])
@pytest.mark.parametrize("n_experts", [5, 200])
def test_few_pairs(device, n_experts, capacity):
    """At most 32: a GPU has a kernel of its own for these."""
    for n_tokens, top_k in ((1, 1), (1, 5), (6, 5), (16, 2), (32, 1), (33, 1)):
        experts = torch.randint(-1, min(n_experts, 9), (n_tokens, top_k), device=device).int()
        plan = moe.plan(experts, n_experts, capacity=capacity)
        equal_plans(plan, reference.plan(experts, n_experts, capacity))


def test_what_is_dropped(device):
    experts = torch.tensor([[0, 1], [1, 0], [0, 1]], dtype=torch.int32, device=device)
    weights = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], device=device)
    order = moe.plan(experts, 2, capacity=2)
    # expert 0: first choices of tokens 0 and 2; expert 1: token 1's first, then token 0's second
    assert order.token_rows.tolist() == [[0, 2], [3, -1], [1, -1]]
    assert order.counts.tolist() == [3, 3]
    heaviest = moe.plan(experts, 2, capacity=2, drop_policy="weight", weights=weights)
    assert heaviest.token_rows.tolist() == [[0, -1], [2, -1], [1, 3]]


def test_weights_that_tie_or_are_nan(device):
    experts, weights = routed(400, 5, 2, device)
    for values in (torch.ones_like(weights), torch.full_like(weights, torch.nan), -weights):
        values[::7] = 0.0
        plan = moe.plan(experts, 5, capacity=30, drop_policy="weight", weights=values)
        equal_plans(plan, reference.plan(experts, 5, 30, "weight", values))


@pytest.mark.parametrize("capacity", [None, 4])
def test_pairs_without_expert(device, capacity):
    experts, _ = routed(100, 9, 4, device)
    experts[torch.rand(experts.shape, device=device) < 0.4] = -1
    plan = moe.plan(experts, 9, capacity=capacity)
    equal_plans(plan, reference.plan(experts, 9, capacity))
    assert capacity or (plan.row_token == -1).any()


def test_a_weight_of_nan_counts_as_minus_infinity(device):
    experts = torch.zeros(3, 1, dtype=torch.int32, device=device)
    for values in ([-torch.inf, torch.nan, 1], [torch.nan, -torch.inf, 1], [torch.nan] * 3):
        weights = torch.tensor(values, device=device)[:, None]
        for capacity in (1, 2):
            plan = moe.plan(experts, 1, capacity=capacity, drop_policy="weight", weights=weights)
            equal_plans(plan, reference.plan(experts, 1, capacity, "weight", weights))


def test_experts_that_nobody_chose(device):
    experts = torch.full((50, 1), 3, dtype=torch.int32, device=device)
    plan = moe.plan(experts, 6)
    assert plan.offsets.tolist() == [0, 0, 0, 0, 50, 50, 50]
    equal_plans(plan, reference.plan(experts, 6))


def test_many_pairs(device):
    experts, weights = routed(30_000, 60, 6, device, skew=1.0)
    equal_plans(moe.plan(experts, 60), reference.plan(experts, 60))
    plan = moe.plan(experts, 60, capacity=2500, drop_policy="weight", weights=weights)
    equal_plans(plan, reference.plan(experts, 60, 2500, "weight", weights))


def test_strided_experts(device):
    experts, _ = routed(40, 8, 4, device)
    for view in (experts[:, 1:3], experts[::2], experts.T.contiguous().T):
        equal_plans(moe.plan(view, 8), reference.plan(view, 8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_index_out_of_range_gets_no_row_on_a_gpu():
    experts = torch.tensor([[0, 7], [-9, 1], [2**31 - 1, -(2**31)]], dtype=torch.int32).cuda()
    plan = moe.plan(experts, 2)
    assert plan.token_rows.tolist() == [[0, -1], [-1, 1], [-1, -1]]
