import math

import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.moe_cases import EXPERTS, TOKENS, close, distinct_logits, dtypes

SCORINGS = ["softmax", "sigmoid", "softmax_after_topk"]


def check(logits, top_k, **options):
    """Forward and backward against the reference; returns the result."""
    actual_in = logits.detach().clone().requires_grad_()
    expected_in = logits.detach().clone().requires_grad_()
    actual = moe.gate(actual_in, top_k, **options)
    expected = reference.gate(expected_in, top_k, **options)
    assert actual.experts.dtype == torch.int32
    assert torch.equal(actual.experts, expected.experts)
    close(actual.weights, expected.weights, nan=True)
    close(actual.logsumexp, expected.logsumexp, nan=True)
    a, b = torch.randn_like(actual.weights), torch.randn_like(actual.logsumexp)
    ((actual.weights * a).sum() + (actual.logsumexp * b).sum()).backward()
    ((expected.weights * a).sum() + (expected.logsumexp * b).sum()).backward()
    assert actual_in.grad.dtype == logits.dtype
    close(actual_in.grad, expected_in.grad, nan=True)
    return actual


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("renormalize", [False, True])
def test_every_dtype(device, scoring, renormalize):
    for dtype in dtypes(device):
        logits = distinct_logits(65, 40, device, dtype)
        check(logits, 6, scoring=scoring, renormalize=renormalize, scale=2.5)


@pytest.mark.parametrize("n_experts", EXPERTS)
def test_every_number_of_experts(device, n_experts):
    for n_tokens in TOKENS:
        for top_k in sorted({1, min(2, n_experts), min(7, n_experts), min(32, n_experts)}):
            check(distinct_logits(n_tokens, n_experts, device), top_k)


@pytest.mark.parametrize("scoring", SCORINGS)
def test_bias_moves_the_choice_and_not_the_weight(device, scoring):
    logits = distinct_logits(50, 64, device)
    bias = torch.linspace(-1, 1, 64, device=device)[torch.randperm(64, device=device)]
    biased = check(logits, 4, scoring=scoring, bias=bias)
    assert not torch.equal(biased.experts, moe.gate(logits, 4, scoring=scoring).experts)


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize(
    "n_experts,n_group,topk_group,top_k",
    [
        (256, 8, 4, 8),
        (64, 8, 2, 6),
        (32, 32, 5, 5),
        (96, 3, 1, 32),
        (40, 5, 5, 4),
        (1024, 32, 3, 9),
    ],
)
def test_groups(device, scoring, n_experts, n_group, topk_group, top_k):
    logits = distinct_logits(40, n_experts, device)
    bias = torch.linspace(-0.5, 0.5, n_experts, device=device)
    for options in ({}, {"bias": bias}):
        result = check(
            logits, top_k, scoring=scoring, n_group=n_group, topk_group=topk_group, **options
        )
        groups = result.experts.long() // (n_experts // n_group)
        assert max(len(row.unique()) for row in groups) <= topk_group


def test_threshold(device):
    logits = distinct_logits(80, 24, device)
    threshold = torch.full((24,), 0.1, device=device)
    result = check(logits, 6, threshold=threshold)
    used = result.experts >= 0
    assert used.any() and not used.all()
    assert (result.weights[used] >= 0.1).all() and (result.weights[~used] == 0).all()
    nothing = check(logits, 6, threshold=torch.full((24,), 2.0, device=device), renormalize=True)
    assert (nothing.experts == -1).all() and (nothing.weights == 0).all()


def test_masked_tokens_take_no_expert(device):
    logits = distinct_logits(64, 16, device)
    mask = torch.rand(64, device=device) > 0.5
    for scoring in SCORINGS:
        result = check(logits, 3, scoring=scoring, mask=mask, renormalize=True)
        assert (result.experts[~mask] == -1).all()


def test_ties_go_to_the_lower_expert(device):
    for n_experts in (8, 40, 130):
        result = check(torch.zeros(5, n_experts, device=device), 4)
        assert result.experts.tolist() == [[0, 1, 2, 3]] * 5
    signed_zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0]], device=device)
    assert moe.gate(signed_zeros, 4).experts.tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("how_many", [1, 20, 33])
def test_nan_and_infinity_never_give_a_wrong_expert(device, scoring, bad, how_many):
    for options in ({}, {"bias": torch.zeros(33, device=device)}, {"n_group": 3, "topk_group": 2}):
        logits = torch.randn(64, 33, device=device)
        for row in logits:
            row[torch.randperm(33, device=device)[:how_many]] = bad
        logits = logits.detach().requires_grad_()
        result = moe.gate(logits, 8, scoring=scoring, renormalize=True, **options)
        assert (result.experts >= 0).all() and (result.experts < 33).all()
        assert all(len(row.unique()) == 8 for row in result.experts)
        if not options:
            expected = reference.gate(logits, 8, scoring, True)
            assert torch.equal(result.experts, expected.experts)
            close(result.weights, expected.weights, nan=True)
            close(result.logsumexp, expected.logsumexp, nan=True)
        result.weights.sum().backward()


def test_strided_logits(device):
    wide = torch.randn(30, 100, device=device)
    for logits in (
        wide[:, 3:43],
        wide[::2, :40],
        wide.T[:40],
        wide[:, :80:2],
        wide[:1].expand(9, 100),
    ):
        check(logits, 5)


def test_extreme_logits_keep_their_weights(device):
    logits = torch.tensor([[200.0, 199.0, -300.0, 0.0], [-500.0, -501.0, -502.0, -503.0]])
    result = check(logits.to(device), 2, renormalize=True)
    close(result.weights.sum(-1), torch.ones(2))


def test_gradient_in_float64():
    logits = distinct_logits(7, 12, "cpu", torch.float64).requires_grad_()
    mask = torch.tensor([True] * 6 + [False])
    for scoring in SCORINGS:
        for renormalize in (False, True):
            for extra in ({}, {"mask": mask}, {"threshold": torch.full((12,), 0.1).double()}):
                assert torch.autograd.gradcheck(
                    lambda x, s=scoring, r=renormalize, o=extra: moe.gate(
                        x, 4, scoring=s, renormalize=r, scale=1.5, **o
                    )[::2],
                    logits,
                )
