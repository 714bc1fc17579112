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


GOOD = {"x": (4, 6), "up": (3, 8, 6), "down": (3, 6, 4), "weights": (4, 2)}


def layer(plan=plan, activation="swiglu", **changed):
    """experts on 4 tokens, 3 experts, 2 choices, 6 wide with 4 inner columns; but for what changed,
    which is a shape or a tensor."""
    given = {k: v if torch.is_tensor(v) else torch.zeros(v) for k, v in (GOOD | changed).items()}
    options = {k: given.pop(k) for k in ("gate_up_bias", "down_bias") if k in given}
    if "sums" in given:
        options["main_grads"] = (given.pop("sums"), None)
    return moe.experts(
        *(given[k] for k in ("x", "up", "down")), plan(), given["weights"], activation, **options
    )


def other_plan(**changed):
    return lambda: plan()._replace(**changed)


def offsets(*values):
    return torch.tensor(values, dtype=i)


def backward(grad=(4, 6), pre=(8, 8), sums=(None, None)):
    p = plan()
    x, up, down, w = (torch.zeros(size) for size in GOOD.values())
    return torch.ops.sparsemoe.experts_backward(
        torch.zeros(grad), x, up, down, None, None, w, p.offsets, *p[2:], "swiglu", torch.zeros(pre),
        True, True, True, *sums,
    )  # fmt: skip


def product(a=(4, 6), b=(3, 6, 5), at=(0, 1, 2, 4)):
    a, b = (t if torch.is_tensor(t) else torch.zeros(t) for t in (a, b))
    return moe.grouped_mm(a, b, at if torch.is_tensor(at) else offsets(*at))


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
    "experts x": (lambda: layer(x=(4, 5)), r"x must have shape \[tokens, 6\], got \[4, 5\]"),
    "experts x rank": (lambda: layer(x=(4,)), r"x must have shape \[tokens, 6\], got \[4\]"),
    "experts x dtype": (lambda: layer(x=experts(4, 6)), "x must be float32.* got Int"),
    "experts tokens": (lambda: layer(x=(5, 6)), r"x must have the 4 tokens of the plan, got shape \[5, 6\]"),
    "experts up rank": (lambda: layer(up=(8, 6)), r"gate_up_proj must have shape \[experts, .*, hidden\], got \[8, 6\]"),
    "experts up odd": (lambda: layer(up=(3, 9, 6)), r"gate_up_proj must have an even number of rows an expert with swiglu, got shape \[3, 9, 6\]"),
    "experts up dtype": (lambda: layer(up=logits(3, 8, 6, dtype=torch.bfloat16)), "gate_up_proj must have dtype Float, got BFloat16"),
    "experts down": (lambda: layer(down=(3, 6, 5)), r"down_proj must have shape \[3, 6, 4\] beside gate_up_proj \[3, 8, 6\], got \[3, 6, 5\]"),
    "experts down, no gate": (lambda: layer(activation="relu2"), r"down_proj must have shape \[3, 6, 8\]"),
    "experts down dtype": (lambda: layer(down=logits(3, 6, 4).half()), "down_proj must have dtype Float, got Half"),
    "experts up bias": (lambda: layer(gate_up_bias=(3, 4)), r"gate_up_bias must have shape \[3, 8\], got \[3, 4\]"),
    "experts up bias dtype": (lambda: layer(gate_up_bias=logits(3, 8).double()), "gate_up_bias must have dtype Float, got Double"),
    "experts down bias": (lambda: layer(down_bias=(6,)), r"down_bias must have shape \[3, 6\], got \[6\]"),
    "experts weights": (lambda: layer(weights=(4, 3)), r"weights must hold one value for each of the 8 pairs of the plan, got shape \[4, 3\]"),
    "experts activation": (lambda: layer(activation="tanh"), "activation must be one of .* got 'tanh'"),
    "experts bare activation": (
        lambda: torch.ops.sparsemoe.experts(*map(torch.zeros, list(GOOD.values())[:3]), None, None, None, plan()[0], *plan()[2:], "tanh", False),
        "activation must be one of swiglu, geglu, relu2, silu, gelu, got 'tanh'",
    ),
    "experts fewer": (lambda: layer(up=(2, 8, 6), down=(2, 6, 4)), r"plan.offsets must have shape \[3\], one more than the experts, got \[4\]"),
    "experts offsets dtype": (lambda: layer(other_plan(offsets=offsets(0, 2, 4, 8).long())), "plan.offsets must have dtype Int, got Long"),
    "experts offsets start": (lambda: layer(other_plan(offsets=offsets(1, 2, 4, 8))), r"plan.offsets must ascend from 0 to at most the 8 rows, got 1 at \[0\]"),
    "experts offsets descend": (lambda: layer(other_plan(offsets=offsets(0, 4, 2, 8))), r"plan.offsets must ascend .* got 2 at \[2\]"),
    "experts offsets end": (lambda: layer(other_plan(offsets=offsets(0, 2, 4, 9))), r"plan.offsets must ascend .* the 8 rows, got 9 at \[3\]"),
    "experts row_pair": (lambda: layer(other_plan(row_pair=offsets(1, 2))), r"plan.row_pair must have shape .* with size 8 .*got \[2\]"),
    "experts row_token": (lambda: layer(other_plan(row_token=offsets(1).float())), "plan.row_token must have dtype Int, got Float"),
    "experts token_rows": (lambda: layer(other_plan(token_rows=offsets(1, 2))), r"plan.token_rows must have shape \[tokens, top_k\], got \[2\]"),
    "experts sum shape": (lambda: layer(sums=(3, 6, 8)), r"main_grads\[0\] must be a contiguous float32 tensor of shape \[3, 8, 6\] on cpu, got torch.float32 \[3, 6, 8\]"),
    "experts sum dtype": (lambda: layer(sums=logits(3, 8, 6).bfloat16()), r"main_grads\[0\] must be .* got torch.bfloat16"),
    "experts sum strides": (lambda: layer(sums=logits(3, 6, 8).mT), r"main_grads\[0\] must be a contiguous .* with strides"),
    "backward grad": (lambda: backward(grad=(4, 5)), r"grad must have shape \[4, 6\], got \[4, 5\]"),
    "backward pre": (lambda: backward(pre=(8, 4)), r"pre must have shape \[8, 8\], got \[8, 4\]"),
    "backward sum": (lambda: backward(sums=(logits(3, 8, 6).half(), None)), "gate_up_sum must have dtype Float, got Half"),
    "backward sum shape": (lambda: backward(sums=(None, logits(3, 8, 6))), r"down_sum must have shape \[3, 6, 4\], got \[3, 8, 6\]"),
    "backward sum strides": (lambda: backward(sums=(None, logits(3, 4, 6).mT)), "down_sum must be contiguous"),
    "product a": (lambda: product(a=(4, 5)), r"a must have the 6 columns that b \[3, 6, 5\] takes, got shape \[4, 5\]"),
    "product a rank": (lambda: product(a=(6,)), r"a must have shape \[rows, in\], got \[6\]"),
    "product a dtype": (lambda: product(a=experts(4, 6)), "a must be float32.* got Int"),
    "product b rank": (lambda: product(b=(6, 5)), r"b must have shape \[experts, in, out\], got \[6, 5\]"),
    "product b dtype": (lambda: product(b=logits(3, 6, 5).half()), "b must have dtype Float, got Half"),
    "product offsets": (lambda: product(at=(0, 1, 2)), r"offsets must have shape \[4\], one more than the experts, got \[3\]"),
    "product offsets rank": (lambda: product(at=offsets(0, 1, 2, 4)[None]), r"offsets must have shape \[4\]"),
    "product offsets dtype": (lambda: product(at=offsets(0, 1, 2, 4).long()), "offsets must have dtype Int, got Long"),
    "product offsets order": (lambda: product(at=(0, 3, 2, 4)), r"offsets must ascend from 0 to at most the 4 rows, got 2 at \[2\]"),
    "product offsets end": (lambda: product(at=(0, 1, 2, 5)), r"offsets must ascend .* the 4 rows, got 5 at \[3\]"),
    "product offsets below": (lambda: product(at=(-1, 1, 2, 3)), r"offsets must ascend .* got -1 at \[0\]"),
    "product grad": (
        lambda: torch.ops.sparsemoe.grouped_mm_backward_b(torch.zeros(4, 6), torch.zeros(3, 5), offsets(0, 4), False),
        r"grad must have shape \[rows, out\] with size 4 in dimension 0, got \[3, 5\]",
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
    cuda = {k: torch.zeros(v, device="cuda") for k, v in GOOD.items()}

    def cuda_plan():
        return moe.plan(experts().cuda(), 3)

    for name, message in (
        ("up", "gate_up_proj must be on the same device as x"),
        ("down", "down_proj must be on the same device as x"),
        ("weights", "weights must be on the same device as x"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer(cuda_plan, **cuda | {name: torch.zeros(GOOD[name])})
    with pytest.raises(RuntimeError, match="plan.row_token must be on the same device as x"):
        layer(**cuda)
    with pytest.raises(RuntimeError, match="x must be .* on a GPU, got float64"):
        layer(cuda_plan, **{k: v.double() for k, v in cuda.items()})
    with pytest.raises(RuntimeError, match="b must be on the same device as a"):
        product(a=torch.zeros(4, 6, device="cuda"), at=offsets(0, 1, 2, 4).cuda())
    with pytest.raises(RuntimeError, match="offsets must be on the same device as a"):
        product(*(torch.zeros(s, device="cuda") for s in ((4, 6), (3, 6, 5))))
