# ruff: noqa: E501 (a table: one case a line)
"""Every wrong input gets one sentence that names the argument, what came and what must come."""

import pytest
import torch

from sparsemoe.ops import moe

f, i = torch.float32, torch.int32


def logits(*size, dtype=f):
    return torch.zeros(size or (4, 6), dtype=dtype)


def experts(*size, dtype=i):
    return torch.zeros(size or (4, 2), dtype=dtype)


def plan():
    return moe.plan(experts(), 3)


CASES = {
    "gate rank": (lambda: moe.gate(logits(4), 1), r"logits must have shape \[tokens, experts\], got \[4\]"),
    "gate dtype": (lambda: moe.gate(logits(dtype=torch.int64), 1), "logits must be float32.* got Long"),
    "k over E": (lambda: moe.gate(logits(), 7), r"top_k must be from 1 to .* = 6, got 7"),
    "k zero": (lambda: moe.gate(logits(), 0), "top_k must be from 1 .* got 0"),
    "k over 32": (lambda: moe.gate(logits(2, 64), 33), "top_k must be from 1 .* = 32, got 33"),
    "E zero": (lambda: moe.gate(logits(4, 0), 1), r"logits must have 1 to 1024 experts, got shape \[4, 0\]"),
    "E over 1024": (lambda: moe.gate(logits(2, 1025), 1), "logits must have 1 to 1024 experts"),
    "scoring": (lambda: moe.gate(logits(), 1, scoring="relu"), "scoring must be 'softmax'.* got 'relu'"),
    "scale": (lambda: moe.gate(logits(), 1, scale=0.0), "scale must be finite and above 0, got 0"),
    "bias size": (lambda: moe.gate(logits(), 1, bias=torch.zeros(5)), r"bias must have shape \[experts\] with size 6.* got \[5\]"),
    "bias dtype": (lambda: moe.gate(logits(), 1, bias=torch.zeros(6).half()), "bias must have dtype Float, got Half"),
    "mask dtype": (lambda: moe.gate(logits(), 1, mask=torch.ones(4)), "mask must have dtype Bool, got Float"),
    "mask size": (lambda: moe.gate(logits(), 1, mask=torch.ones(3).bool()), r"mask must have shape \[tokens\] with size 4"),
    "n_group": (lambda: moe.gate(logits(), 1, n_group=4), "n_group must .* divide the 6 experts, got 4"),
    "topk_group": (lambda: moe.gate(logits(), 1, n_group=3, topk_group=4), "topk_group must be from 1 to n_group = 3, got 4"),
    "k over groups": (lambda: moe.gate(logits(), 3, n_group=3), "top_k must be at most the 2 experts of topk_group groups, got 3"),
    "choice capacity": (lambda: moe.expert_choice(logits(), 5), "capacity must be from 0 to the 4 tokens of a group, got 5"),
    "choice negative": (lambda: moe.expert_choice(logits(), -1), "capacity must be from 0 .* got -1"),
    "choice groups": (lambda: moe.expert_choice(logits(), 1, n_groups=3), "n_groups must divide the 4 tokens, got 3"),
    "plan rank": (lambda: moe.plan(experts(4), 2), r"experts must have shape \[tokens, top_k\], got \[4\]"),
    "plan dtype": (lambda: moe.plan(experts(dtype=torch.int64), 2), "experts must have dtype Int, got Long"),
    "plan E zero": (lambda: moe.plan(experts(), 0), "num_experts must be from 1 to 1024, got 0"),
    "plan capacity": (lambda: moe.plan(experts(), 2, capacity=-2), "capacity must be 0 or more, got -2"),
    "plan policy": (lambda: moe.plan(experts(), 2, capacity=1, drop_policy="random"), "drop_policy must be 'order' or 'weight', got 'random'"),
    "plan weights": (lambda: moe.plan(experts(), 2, capacity=1, drop_policy="weight"), "weights must be given"),
    "plan weights shape": (
        lambda: moe.plan(experts(), 2, capacity=1, drop_policy="weight", weights=torch.ones(4, 3)),
        r"weights must have shape \[tokens, top_k\] with size 2",
    ),
    "plan index": (lambda: moe.plan(experts() + 5, 3), r"experts must hold indices from 0 to 2, or -1 for none, got 5 at \[0, 0\]"),
    "plan index below": (lambda: moe.plan(experts() - 2, 3), "experts must hold indices .* got -2"),
    "tokens index": (lambda: moe.plan_from_tokens(experts() + 9, 9), r"tokens must hold indices from 0 to 8, .* got 9"),
    "tokens rank": (lambda: moe.plan_from_tokens(experts(3), 9), "tokens must have shape"),
    "dispatch rank": (lambda: moe.dispatch(torch.zeros(4), plan()), r"x must have shape \[tokens, width\], got \[4\]"),
    "dispatch tokens": (lambda: moe.dispatch(torch.zeros(5, 2), plan()), r"x must have shape .* size 4 in dimension 0, got \[5, 2\]"),
    "dispatch dtype": (lambda: moe.dispatch(torch.zeros(4, 2, dtype=i), plan()), "x must be float32"),
    "combine rows": (lambda: moe.combine(torch.zeros(7, 2), plan()), r"rows must have shape .* size 8 in dimension 0, got \[7, 2\]"),
    "combine weights": (lambda: moe.combine(torch.zeros(8, 2), plan(), torch.ones(3)), r"weights must hold one value for each of the 8 pairs.* got shape \[3\]"),
    "experts x": (
        lambda: moe.experts(torch.zeros(4, 5), torch.zeros(3, 8, 6), torch.zeros(3, 6, 4), plan()),
        r"x must have shape \[tokens, 6\], got \[4, 5\]",
    ),
    "experts down": (
        lambda: moe.experts(torch.zeros(4, 6), torch.zeros(3, 8, 6), torch.zeros(3, 6, 5), plan()),
        r"down_proj must have shape \[3, 6, 4\]",
    ),
    "experts activation": (
        lambda: moe.experts(torch.zeros(4, 6), torch.zeros(3, 8, 6), torch.zeros(3, 6, 4), plan(), None, "tanh"),
        "activation must be one of .* got 'tanh'",
    ),
    "grouped_linear": (
        lambda: moe.grouped_linear(torch.zeros(4, 6), torch.zeros(3, 8, 5), torch.zeros(4, dtype=i)),
        "x must have the 5 columns of weight",
    ),
    "grouped offsets": (
        lambda: moe.grouped_linear(torch.zeros(4, 5), torch.zeros(3, 8, 5), torch.zeros(3, dtype=i)),
        r"offsets must be int32 \[experts \+ 1\] = \[4\], got",
    ),
    "balance counts": (
        lambda: moe.load_balance_loss(logits(), torch.zeros(5, dtype=i)),
        r"counts must have shape \[experts\] with size 6",
    ),
    "z-loss rank": (lambda: moe.router_z_loss(logits()), r"logsumexp must have shape \[tokens\]"),
    "z-loss dtype": (lambda: moe.router_z_loss(torch.zeros(4).half()), "logsumexp must be float32"),
    "bias counts": (
        lambda: moe.update_expert_bias_(torch.zeros(4), torch.zeros(3, dtype=i), 0.1),
        r"counts must have shape \[experts\] with size 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, message = CASES[name]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_two_devices():
    with pytest.raises(RuntimeError, match="mask must be on the same device as logits"):
        moe.gate(logits().cuda(), 1, mask=torch.ones(4).bool())
    with pytest.raises(RuntimeError, match="plan.row_token must be on the same device as x"):
        moe.dispatch(torch.zeros(4, 2).cuda(), plan())
    with pytest.raises(RuntimeError, match="logits must be .* on a GPU, got float64"):
        moe.gate(logits(dtype=torch.float64).cuda(), 1)
