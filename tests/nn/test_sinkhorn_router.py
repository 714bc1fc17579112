import itertools

import pytest
import torch

from sparsemoe import nn
from sparsemoe.reference import sinkhorn as reference


def make(device, hidden_size=16, num_experts=8, top_k=2, **options):
    return nn.SinkhornRouter(hidden_size, num_experts, top_k, **options).to(device)


def skewed(device, **options):
    """A router that prefers its last experts for tokens whose first feature is 1."""
    router = make(device, **options)
    with torch.no_grad():
        router.linear.weight[:, 0] = torch.linspace(-3, 3, router.num_experts)
        router.linear.weight[:, 1:] = torch.randn_like(router.linear.weight[:, 1:]) / 4
    return router


def tokens_for(router, count):
    x = torch.randn(count, 16, device=router.linear.weight.device)
    x[:, 0] = 1
    return x


def busiest(plan) -> float:
    """The largest load over the mean."""
    return (plan.counts.max() / plan.counts.float().mean()).item()


def chosen_by(routed, num_experts):
    """[T, k] the experts of a plan that dropped nothing; -1 where there is none."""
    rows = routed.plan.token_rows.long()
    expert = torch.bucketize(rows, routed.plan.offsets[1:].long(), right=True)
    return torch.where(rows < 0, -1, expert)


def gathered(values, experts, mask):
    taken = values.gather(1, experts.clamp(min=0))
    return taken if mask is None else torch.where(mask[:, None], taken, 0)


def plain_weights(router, logits, plan, experts, mask):
    """What the docstring says of the weights, in plain PyTorch."""
    if router.weights_from == "plan":
        scores = plan
    elif router.scoring == "sigmoid":
        scores = logits.sigmoid()
    else:
        scores = logits.softmax(-1)
    weights = gathered(scores, experts, mask)
    if router.renormalize or router.scoring == "softmax_after_topk":
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * router.scale


@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_training_is_balanced_where_top_k_is_not(device, per_sequence, top_k):
    router = skewed(device, per_sequence=per_sequence, top_k=top_k)
    x = tokens_for(router, 4096)
    assert busiest(router(x, None, 8).plan) < (1.3 if top_k == 1 else 1.15)
    plain = nn.TopKRouter(16, 8, top_k).to(device)
    plain.linear = router.linear
    assert busiest(plain(x).plan) > 1.7
    assert busiest(router.eval()(x).plan) == busiest(plain(x).plan)


WAYS = [
    *itertools.product(["scores"], ["softmax", "sigmoid"], [False, True]),
    ("scores", "softmax_after_topk", False),
    *itertools.product(["plan"], ["softmax"], [False, True]),
]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("per_sequence", [False, True])
@pytest.mark.parametrize(("weights_from", "scoring", "renormalize"), WAYS)
def test_training_against_plain_pytorch(
    device, weights_from, scoring, renormalize, per_sequence, masked
):
    router = skewed(
        device,
        weights_from=weights_from,
        scoring=scoring,
        renormalize=renormalize,
        per_sequence=per_sequence,
        scale=2.5,
        temperature=0.7,
        n_iters=5,
    )
    x = tokens_for(router, 4 * 33)
    mask = torch.rand(len(x), device=device) > 0.3 if masked else None
    routed = router(x, mask, 4)
    experts = chosen_by(routed, 8)

    logits = x @ router.linear.weight.T
    shape = (4, 33) if per_sequence else (1, 4 * 33)
    plan = reference.sinkhorn(
        logits.view(*shape, 8),
        n_iters=5,
        temperature=0.7,
        mask=None if mask is None else mask.view(shape),
    ).view_as(logits)
    expected = plan.topk(2).indices
    if mask is not None:
        expected[~mask] = -1
    assert torch.equal(experts, expected)
    weights = plain_weights(router, logits, plan, expected, mask)
    torch.testing.assert_close(routed.weights, weights, rtol=1e-4, atol=1e-5)
    logsumexp = logits.logsumexp(-1)
    if mask is not None:
        logsumexp = logsumexp * mask
    torch.testing.assert_close(routed.logits, logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(routed.logsumexp, logsumexp, rtol=1e-4, atol=1e-4)

    factor = torch.randn_like(weights)
    found, wanted = (
        torch.autograd.grad((w * factor).sum() + lse.square().mean(), router.linear.weight)[0]
        for w, lse in ((routed.weights, routed.logsumexp), (weights, logsumexp))
    )
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("inference", ["topk", "bias"])
@pytest.mark.parametrize(("weights_from", "scoring", "renormalize"), WAYS)
def test_inference_against_plain_pytorch(device, weights_from, scoring, renormalize, inference):
    router = skewed(
        device,
        inference=inference,
        weights_from=weights_from,
        scoring=scoring,
        renormalize=renormalize,
        scale=1.5,
        temperature=0.7,
    ).eval()
    bias = router.expert_bias.copy_(torch.linspace(2, -2, 8))
    x = tokens_for(router, 100)
    mask = torch.rand(100, device=device) > 0.3
    routed = router(x, mask)
    logits = x @ router.linear.weight.T
    shifted = logits + bias if inference == "bias" else logits
    expected = shifted.topk(2).indices
    expected[~mask] = -1
    assert torch.equal(chosen_by(routed, 8), expected)
    plan = (shifted / 0.7).softmax(-1)
    weights = plain_weights(router, logits, plan, expected, mask)
    torch.testing.assert_close(routed.weights, weights, rtol=1e-4, atol=1e-5)


def test_one_sequence_does_not_route_another(device):
    x = tokens_for(skewed(device), 4 * 64)
    other = x.clone()
    other[64:] = tokens_for(skewed(device), 3 * 64) * 2

    def first(router, x):
        return chosen_by(router(x, None, 4), 8)[:64]

    router = skewed(device, per_sequence=True)
    assert torch.equal(first(router, x), first(router, other))
    router.per_sequence = False
    assert not torch.equal(first(router, x), first(router, other))


@pytest.mark.parametrize("per_sequence", [False, True])
def test_learned_bias_balances_each_token_by_itself(device, per_sequence):
    router = skewed(device, inference="bias", momentum=0.9, per_sequence=per_sequence)
    for _ in range(60):
        router(tokens_for(router, 1024), None, 8)
    router.eval()
    x = tokens_for(router, 4096)
    routed = router(x)
    assert busiest(routed.plan) < 1.15
    alone = router(x[:10])
    assert torch.equal(chosen_by(alone, 8), chosen_by(routed, 8)[:10])
    torch.testing.assert_close(alone.weights, routed.weights[:10])
    router.inference = "topk"
    assert busiest(router(x).plan) > 1.7


def test_bias_is_the_moving_average_of_what_training_adds(device):
    router = skewed(device, momentum=0.75, temperature=0.5, per_sequence=True)
    x = tokens_for(router, 4 * 32)
    mask = torch.rand(len(x), device=device) > 0.3
    mask[:32] = False  # a sequence without tokens counts nowhere
    _, _, log_v, _, _ = reference.sinkhorn(
        (x @ router.linear.weight.T).view(4, 32, 8),
        temperature=0.5,
        mask=mask.view(4, 32),
        return_scalings=True,
    )
    tokens = mask.view(4, 32).sum(1)
    assert tokens[0] == 0 and len(set(tokens.tolist())) > 2
    centred = 0.5 * (log_v - log_v.mean(1, keepdim=True))
    mean = (centred * tokens[:, None]).sum(0) / tokens.sum()
    router(x, mask, 4)
    torch.testing.assert_close(router.expert_bias, 0.25 * mean, rtol=1e-4, atol=1e-5)
    router(x, mask, 4)
    torch.testing.assert_close(router.expert_bias, (0.25 + 0.1875) * mean, rtol=1e-4, atol=1e-5)
    before = router.expert_bias.clone()
    router(x, torch.zeros_like(mask), 4)
    router(x[:0])
    router.eval()(x, mask, 4)
    assert torch.equal(router.expert_bias, before)
    whole = skewed(device, momentum=0.0)
    whole(x)
    _, _, log_v, _, _ = reference.sinkhorn(x @ whole.linear.weight.T, return_scalings=True)
    torch.testing.assert_close(whole.expert_bias, log_v - log_v.mean(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"inference": "bias", "scoring": "sigmoid"}])
def test_masked_tokens_take_no_part(device, options, training):
    router = skewed(device, **options).train(training)
    router.expert_bias.copy_(torch.linspace(2, -2, 8))
    x = tokens_for(router, 256)
    mask = torch.rand(256, device=device) > 0.5
    changed = torch.where(mask[:, None], x, 100.0)
    routed = router(changed, mask)
    experts = chosen_by(routed, 8)
    assert (experts[~mask] == -1).all() and (routed.weights[~mask] == 0).all()
    alone = router(x[mask])
    assert torch.equal(experts[mask], chosen_by(alone, 8))
    torch.testing.assert_close(routed.weights[mask], alone.weights)
    assert torch.equal(routed.plan.counts, alone.plan.counts)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"inference": "bias"},
        {"per_sequence": True, "tolerance": 1e-3},
        {"weights_from": "plan", "inference": "bias", "jitter": 0.1},
    ],
)
def test_compile_without_a_graph_break(device, options, training):
    router = skewed(device, **options).train(training)
    router.expert_bias.copy_(torch.linspace(2, -2, 8))
    x = tokens_for(router, 128)
    mask = torch.rand(128, device=device) > 0.3
    before = router.expert_bias.clone()
    torch.manual_seed(1)
    expected = router(x, mask, 4)
    bias = router.expert_bias.clone()
    router.expert_bias.copy_(before)
    torch.manual_seed(1)
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)(x, mask, 4)
    assert torch.equal(chosen_by(compiled, 8), chosen_by(expected, 8))
    torch.testing.assert_close(compiled.weights, expected.weights)
    torch.testing.assert_close(router.expert_bias, bias)
    compiled.weights[:, 0].sum().backward()
    assert router.linear.weight.grad.abs().sum() > 0


def test_state_dict_round_trip(device):
    router = skewed(device, inference="bias")
    router(tokens_for(router, 512))
    state = router.state_dict()
    assert state.keys() == {"linear.weight", "expert_bias"} and state["expert_bias"].any()
    other = make(device, inference="bias")
    other.load_state_dict(state)
    x = tokens_for(router, 64)
    assert torch.equal(
        chosen_by(router.eval()(x), 8), chosen_by(other.eval()(x), 8)
    ) and torch.equal(router.expert_bias, other.expert_bias)


def test_autocast_keeps_float32(device):
    router = skewed(device, per_sequence=True)
    x = tokens_for(router, 64)
    with torch.autocast(device, torch.bfloat16):
        routed = router(x, None, 4)
    assert {routed.logits.dtype, routed.weights.dtype, routed.logsumexp.dtype} == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("per_sequence", [False, True])
def test_does_not_wait_for_the_device(per_sequence):
    router = skewed("cuda", per_sequence=per_sequence, inference="bias")
    x = tokens_for(router, 256)
    mask = torch.rand(256, device="cuda") > 0.5

    def run():
        for given in (None, mask):
            router.train()(x, given, 4).weights.sum().backward()
            router.eval()(x, given, 4)

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 9}, "top_k must be at most num_experts = 8, got 9"),
        ({"n_iters": 0}, "n_iters must be 1 or more, got 0"),
        ({"tolerance": -0.1}, "tolerance must be 0 or more or None, got -0.1"),
        ({"temperature": 0.0}, "temperature must be above 0, got 0.0"),
        ({"inference": "best"}, "inference must be 'topk' or 'bias', got 'best'"),
        ({"momentum": 1.0}, "momentum must be from 0 to below 1, got 1.0"),
        ({"weights_from": "u"}, "weights_from must be 'scores' or 'plan', got 'u'"),
        ({"scoring": "relu"}, "scoring must be 'softmax', .* got 'relu'"),
        (
            {"scoring": "sigmoid", "weights_from": "plan"},
            "scoring must be 'softmax' with weights_from='plan', got 'sigmoid'",
        ),
        ({"capacity_factor": 0.0}, "capacity_factor must be above 0 or None, got 0.0"),
        ({"jitter": 1.0}, "jitter must be from 0 to below 1, got 1.0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        make("cpu", **options)
