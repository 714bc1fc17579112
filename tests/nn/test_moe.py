import math
import warnings

import pytest
import torch

from sparsemoe import nn
from sparsemoe.reference import moe as reference


def make(device, **options):
    settings = {"hidden_size": 32, "intermediate_size": 24, "num_experts": 8, "top_k": 2, **options}
    return nn.MoE(**settings).to(device)


OPTIONS = [
    {},
    {"capacity_factor": 1.0},
    {"capacity_factor": 0.5, "drop_policy": "weight"},
    {"num_shared_experts": 2, "activation": "geglu"},
    {"bias": True, "recompute": True, "capacity_factor": 1.5},
    {"scoring": "sigmoid", "expert_bias": True, "n_group": 4, "topk_group": 2, "scale": 2.5},
    {"router": "expert_choice"},
    {"router": "expert_choice", "causal": True},
    {"router": "sinkhorn", "capacity_factor": 1.25},
    {"router": "sinkhorn", "per_sequence": True, "scoring": "sigmoid", "jitter": 0.1},
    {"router": "sinkhorn", "weights_from": "plan", "inference": "bias", "drop_policy": "weight"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_forward_backward_and_metrics(device, options):
    layer = make(device, **options)
    x = torch.randn(3, 16, 32, device=device, requires_grad=True)
    y, routing = layer(x)
    assert y.shape == x.shape
    (
        y.square().mean() + 0.01 * routing.load_balance_loss + 0.001 * routing.router_z_loss
    ).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name
    assert math.isclose(routing.load().sum().item(), 1, rel_tol=1e-5)
    assert 0 <= routing.load_entropy() <= math.log(8) + 1e-5
    assert -1e-6 <= routing.dropped_share() < 1


@pytest.mark.parametrize("bias", [False, True])
def test_against_one_expert_at_a_time(device, bias):
    layer = make(device, num_shared_experts=1, bias=bias)
    up_bias, down_bias = layer.experts.gate_up_proj_bias, layer.experts.down_proj_bias
    x = torch.randn(20, 32, device=device)
    y, _ = layer(x)
    probability = (x @ layer.router.linear.weight.T).softmax(-1)
    weight, chosen = probability.topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    expected = layer.shared_experts(x)
    for t in range(20):
        for w, e in zip(weight[t], chosen[t], strict=True):
            before = layer.experts.gate_up_proj[e] @ x[t] + (up_bias[e] if bias else 0)
            after = layer.experts.down_proj[e] @ reference.activate(before, "swiglu")
            expected[t] += w * (after + (down_bias[e] if bias else 0))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


def test_masked_tokens_get_zero_and_count_nowhere(device):
    layer = make(device)
    x = torch.randn(2, 10, 32, device=device)
    mask = torch.rand(2, 10, device=device) > 0.5
    y, routing = layer(x, mask)
    assert (y[~mask] == 0).all() and routing.counts.sum() == 2 * mask.sum()
    kept, alone = layer(x[mask])
    torch.testing.assert_close(y[mask], kept)
    torch.testing.assert_close(routing.load_balance_loss, alone.load_balance_loss)


def test_capacity_drops_what_it_says(device):
    layer = make(device, capacity_factor=0.5)
    x = torch.randn(64, 32, device=device)
    _, routing = layer(x)
    capacity = layer.router.capacity(64)
    assert capacity == 8
    kept = routing.counts.clamp(max=capacity).sum()
    assert routing.num_kept == kept
    torch.testing.assert_close(routing.dropped_share(), (1 - kept / 128).float())
    assert nn.TopKRouter(8, 10, 1, capacity_factor=1.1).capacity(100) == 11  # exactly, not 12


def test_threshold_follows_expert_choice(device):
    layer = make(device, router="expert_choice", causal=True, momentum=0.0)
    x = torch.randn(4, 64, 32, device=device)
    layer(x)
    layer.eval()
    _, routing = layer(x)
    # each expert takes about its share: 2 experts a token on average
    assert 1.5 < routing.counts.sum().item() / 256 < 2.5
    before = layer.router.threshold.clone()
    alone, _ = layer(x[:, :10])
    torch.testing.assert_close(alone, layer(x)[0][:, :10], rtol=1e-4, atol=1e-5)
    assert torch.equal(before, layer.router.threshold)


def test_choosing_over_whole_sequences_warns_a_causal_model_once():
    router = nn.ExpertChoiceRouter(8, 4, 2)
    with pytest.warns(UserWarning, match="chooses tokens by looking at later ones"):
        router.warn_if_used_causally()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        router.warn_if_used_causally()
        nn.ExpertChoiceRouter(8, 4, 2, causal=True).warn_if_used_causally()


def test_jitter_only_in_training(device):
    layer = make(device, jitter=0.3)
    x = torch.randn(64, 32, device=device)
    layer.eval()
    assert torch.equal(layer(x)[0], layer(x)[0])
    layer.train()
    assert not torch.equal(layer(x)[0], layer(x)[0])


def test_loss_free_balancing(device):
    layer = make(device, expert_bias=True, scoring="sigmoid")
    with torch.no_grad():
        layer.router.linear.weight[0] += 0.5
    x = torch.randn(512, 32, device=device) + 1
    first = layer(x)[1].load_entropy()
    for _ in range(200):
        layer.update_bias(layer(x)[1].counts, rate=0.01)
    assert layer(x)[1].load_entropy() > max(first, 0.98 * math.log(8))


def test_state_dict_names_are_those_of_transformers():
    assert {"experts.gate_up_proj", "experts.down_proj"} <= set(make("cpu").state_dict())
    assert make("cpu").experts.gate_up_proj.shape == (8, 48, 32)


def test_names_with_biases():
    experts = make("cpu", bias=True).experts
    assert experts.gate_up_proj_bias.shape == (8, 48) and experts.down_proj_bias.shape == (8, 32)
    bound = 32**-0.5
    assert 0 < experts.gate_up_proj_bias.abs().max() <= bound
    assert "bias=True" in repr(experts)
    assert not any("bias" in name for name in make("cpu").state_dict())


def test_recomputing_changes_nothing(device):
    layer = make(device, bias=True)
    x = torch.randn(40, 32, device=device)
    grads = []
    for recompute in (False, True):
        layer.experts.recompute = recompute
        grads.append(torch.autograd.grad(layer(x)[0].square().sum(), [*layer.parameters()]))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert make("cpu", recompute=True).experts.recompute


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"router": "expert_choice"},
        {"router": "sinkhorn"},
        {"capacity_factor": 1.25, "bias": True},
    ],
)
def test_compile_without_a_graph_break(device, options):
    layer = make(device, **options)
    x = torch.randn(2, 16, 32, device=device)
    y, routing = torch.compile(layer, fullgraph=True)(x)
    expected, expected_routing = layer(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(routing.counts, expected_routing.counts)
    (y.sum() + routing.load_balance_loss).backward()


def test_autocast_keeps_the_router_in_float32(device):
    layer = make(device)
    x = torch.randn(40, 32, device=device)
    with torch.autocast(device, torch.bfloat16):
        routed = layer.router(x)
        y, _ = layer(x)
    assert routed.logits.dtype == torch.float32 and y.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda: make("cpu", top_k=9), "top_k must be at most num_experts = 8, got 9"),
        (lambda: make("cpu", num_experts=0), "num_experts must be 1 or more, got 0"),
        (lambda: make("cpu", activation="tanh"), "activation must be one of"),
        (lambda: make("cpu", router="random"), "router must be 'topk'"),
        (lambda: make("cpu", capacity_factor=-1.0), "capacity_factor must be above 0 or None"),
        (lambda: make("cpu", jitter=1.5), "jitter must be from 0"),
        (lambda: make("cpu")(torch.zeros(2, 31)), r"x must have shape \[..., 32\], got \[2, 31\]"),
        (
            lambda: make("cpu")(torch.zeros(2, 32), torch.ones(3, dtype=torch.bool)),
            r"mask must have shape \[2\]",
        ),
        (
            lambda: make("cpu", router="expert_choice", capacity_factor=1.0),
            "capacity_factor and jitter must be left out",
        ),
        (lambda: make("cpu", router="sinkhorn", top_k=9), "top_k must be at most num_experts = 8"),
        (
            lambda: make("cpu", router="sinkhorn").update_bias(torch.zeros(8, dtype=torch.int32)),
            "update_bias must be called on a layer with a TopKRouter",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
