import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from sparsemoe.models.moe_lm import START, VOCAB_SIZE, KVCache, MoELM, MoELMConfig
from tests.tiny_lm import tiny_model

KINDS = {
    "moe": {},
    "dense": {"num_experts": 0},
    "mixed": {"dense_layers": [0]},
    "shared": {"num_shared_experts": 1, "scoring": "sigmoid"},
    "expert_choice": {"router": "expert_choice"},
    "sinkhorn": {"router": "sinkhorn", "sinkhorn_inference": "bias"},
    "sinkhorn_plan": {
        "router": "sinkhorn",
        "sinkhorn_weights": "plan",
        "sinkhorn_per_sequence": True,
    },
    "plain": {"qk_norm": False, "num_kv_heads": 2, "renormalize": False},
}


@pytest.fixture(params=KINDS)
def config(request) -> MoELMConfig:
    return tiny_model(**KINDS[request.param])


def make(config: MoELMConfig, seed: int = 0) -> MoELM:
    torch.manual_seed(seed)
    return MoELM(config)


def tokens_of(batch: int, length: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (batch, length), generator=generator)
    tokens[:, 0] = START
    return tokens


def test_num_params(config):
    assert sum(p.numel() for p in make(config).parameters()) == config.num_params()


def test_active_params():
    config = tiny_model(num_experts=8, top_k=3)
    idle = 2 * (8 - 3) * 3 * config.hidden_size * config.expert_size  # in two layers
    assert config.active_params() == config.num_params() - idle
    dense = tiny_model(num_experts=0)
    assert dense.active_params() == dense.num_params()


def test_flops_of_a_dense_model_are_those_counted():
    config = tiny_model(num_experts=0)
    model, tokens = make(config), tokens_of(1, 32)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    # What is counted is attention over the whole square; the model's own count is causal.
    whole = config.num_layers * 4 * 32 * config.num_heads * config.head_dim
    causal = config.num_layers * 4 * 16.5 * config.num_heads * config.head_dim
    assert config.flops_per_token(32) - causal + whole == counter.get_total_flops() / 32
    assert config.flops_per_token(32, training=True) == 3 * config.flops_per_token(32)


@pytest.mark.parametrize("kind", ["moe", "mixed", "shared"])
def test_dense_equivalent_costs_the_same(kind):
    config = tiny_model(**KINDS[kind], num_experts=16, expert_size=24)
    dense = config.dense_equivalent()
    assert dense.num_experts == 0
    unit = 6 * config.hidden_size * config.num_layers  # FLOPs of one more unit of width
    assert abs(dense.flops_per_token() - config.flops_per_token()) <= unit / 2
    assert dense.num_params() < config.num_params()


def test_logits_are_causal(config):
    model = make(config).eval()
    tokens = tokens_of(2, 32)
    changed = tokens.clone()
    changed[:, 20:] = (changed[:, 20:] + 7) % 256
    before, after = model(tokens)[0], model(changed)[0]
    torch.testing.assert_close(before[:, :20], after[:, :20], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before[:, 20], after[:, 20])


@pytest.mark.parametrize("pieces", [[32], [1] * 32, [7, 1, 1, 12, 11]], ids=str)
def test_cached_equals_uncached(config, pieces):
    model = make(config).eval()
    tokens = tokens_of(2, 32)
    expected = model(tokens)[0]
    cache = KVCache(config, batch_size=2)
    logits = [model(part, cache=cache)[0] for part in tokens.split(pieces, dim=1)]
    assert cache.length == 32
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, rtol=1e-4, atol=1e-5)


def test_longer_than_the_context_is_refused():
    model = make(tiny_model())
    with pytest.raises(ValueError, match="position 33; the model's context is 32"):
        model(tokens_of(1, 33))
    cache = KVCache(model.config)
    model(tokens_of(1, 30), cache=cache)
    with pytest.raises(ValueError, match="position 33"):
        model(tokens_of(1, 3), cache=cache)


def test_loss_and_aux():
    config = tiny_model(load_balance_weight=0.5, router_z_weight=0.25, top_k=3)
    model, tokens = make(config), tokens_of(2, 32)
    targets = tokens_of(2, 32, seed=2).clamp(max=255)
    loss, aux = model(tokens, targets)
    logits, _ = model(tokens)
    assert logits.shape == (2, 32, 256)
    nats = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(aux["cross_entropy"], nats)
    expected = nats + 0.5 * aux["load_balance_loss"] + 0.25 * aux["router_z_loss"]
    torch.testing.assert_close(loss, expected)
    assert aux["counts"].shape == (2, 4)
    assert aux["counts"].sum(1).tolist() == [2 * 32 * 3] * 2
    assert aux["num_kept"].item() == 2 * 2 * 32 * 3


def test_a_dense_model_has_no_routing():
    loss, aux = make(tiny_model(num_experts=0))(tokens_of(1, 8), tokens_of(1, 8).clamp(max=255))
    assert set(aux) == {"cross_entropy"}
    assert loss.item() == aux["cross_entropy"].item()


def test_capacity_drops_pairs():
    config = tiny_model(capacity_factor=0.5)
    _, aux = make(config)(tokens_of(4, 32))
    assert 0 < aux["num_kept"] < aux["counts"].sum()


def test_first_loss_is_that_of_a_uniform_guess(config):
    targets = tokens_of(4, 32, seed=2).clamp(max=255)
    aux = make(config)(tokens_of(4, 32), targets)[1]
    assert aux["cross_entropy"].item() == pytest.approx(5.545, abs=0.15)  # log 256


def test_every_parameter_gets_a_gradient(config):
    model = make(config)
    model(tokens_of(4, 32), tokens_of(4, 32, seed=2).clamp(max=255))[0].backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_loss_falls(config):
    model, tokens = make(config), tokens_of(2, 32)
    targets = tokens_of(2, 32, seed=2).clamp(max=255)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss, aux = model(tokens, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert aux["cross_entropy"] < 1.0


def test_expert_bias_moves_towards_balance():
    config = tiny_model(expert_bias_rate=0.01)
    model = make(config)
    counts = torch.tensor([[9, 1, 1, 1], [1, 1, 1, 9]], dtype=torch.int32)
    model.update_expert_bias(counts)
    biases = [b for n, b in model.named_buffers() if n.endswith("expert_bias")]
    expected = [[-0.01, 0.01, 0.01, 0.01], [0.01, 0.01, 0.01, -0.01]]
    torch.testing.assert_close(torch.stack(biases), torch.tensor(expected))


def test_sinkhorn_takes_its_options_from_the_config():
    config = tiny_model(
        router="sinkhorn",
        scoring="sigmoid",
        renormalize=False,
        scale=2.0,
        capacity_factor=1.5,
        jitter=0.25,
        sinkhorn_iters=3,
        sinkhorn_temperature=0.5,
        sinkhorn_per_sequence=True,
        sinkhorn_inference="bias",
    )
    router = make(config).blocks[0].ffn.router
    assert router.scoring == "sigmoid" and not router.renormalize and router.scale == 2.0
    assert (router.capacity_factor, router.jitter) == (1.5, 0.25)
    assert (router.n_iters, router.temperature) == (3, 0.5)
    assert router.per_sequence and router.inference == "bias" and router.weights_from == "scores"
    plan = tiny_model(router="sinkhorn", sinkhorn_weights="plan")
    assert make(plan).blocks[1].ffn.router.weights_from == "plan"


def test_sinkhorn_balances_in_training_and_by_its_bias():
    config = tiny_model(router="sinkhorn", sinkhorn_inference="bias", load_balance_weight=0.0)
    model, batches = make(config), [tokens_of(8, 32, seed) for seed in range(500)]
    with torch.no_grad():
        model.embedding.weight[:, 0] += 0.05  # a feature of every token, which the routers weigh
        for block in model.blocks:
            block.ffn.router.linear.weight[:, 0] = torch.linspace(-0.25, 0.25, 4)
        for tokens in batches:
            model(tokens)

    def busiest() -> float:
        counts = model(tokens_of(8, 32, 1000))[1]["counts"].float()
        return (counts.amax(1) / counts.mean(1)).max().item()

    assert busiest() < 1.3
    model.eval()
    assert busiest() < 1.3
    for block in model.blocks:
        block.ffn.router.inference = "topk"
    assert busiest() > 1.5


@pytest.mark.parametrize("kind", ["moe", "dense", "sinkhorn"])
def test_compiles_without_a_graph_break(kind):
    model = make(tiny_model(**KINDS[kind]))
    tokens, targets = tokens_of(2, 32), tokens_of(2, 32, seed=2).clamp(max=255)
    loss, aux = model(tokens, targets)
    compiled_loss, compiled_aux = torch.compile(model, backend="aot_eager", fullgraph=True)(
        tokens, targets
    )
    torch.testing.assert_close(compiled_loss, loss)
    torch.testing.assert_close(compiled_aux, aux)


def test_bfloat16_autocast_agrees_with_float32(config):
    model = make(config).eval()
    tokens = tokens_of(2, 32)
    expected = model(tokens)[0]
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(tokens)[0]
    assert torch.isfinite(logits).all()
    assert (logits - expected).abs().mean() < 0.05


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 5}, "top_k is 5; it must be at most num_experts"),
        ({"top_k": 0}, "top_k is 0"),
        ({"num_kv_heads": 3}, "num_kv_heads is 3; it must be a divisor of num_heads"),
        ({"head_dim": 15}, "head_dim is 15; it must be even"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"num_experts": -1}, "num_experts is -1"),
        ({"router": "topq"}, "router is 'topq'; it must be one of topk, sinkhorn, exp"),
        ({"dense_layers": [2]}, "dense_layers is"),
        ({"capacity_factor": 0.0}, "capacity_factor is 0.0"),
        ({"router": "expert_choice", "expert_bias_rate": 0.1}, "expert_bias_rate is 0.1"),
        (
            {"router": "expert_choice", "capacity_factor": 1.0},
            "capacity_factor is 1.0; .* left out",
        ),
        (
            {"router": "sinkhorn", "expert_bias_rate": 0.1},
            "expert_bias_rate is 0.1; it must be left out with router sinkhorn",
        ),
        ({"sinkhorn_iters": 0}, "sinkhorn_iters is 0; it must be 1 or more"),
        ({"sinkhorn_temperature": 0.0}, "sinkhorn_temperature is 0.0; it must be above 0"),
        (
            {"sinkhorn_inference": "top"},
            "sinkhorn_inference is 'top'; it must be one of topk, bias",
        ),
        ({"sinkhorn_weights": "gate"}, "sinkhorn_weights is 'gate'; .* one of scores, plan"),
        (
            {"router": "sinkhorn", "sinkhorn_weights": "plan", "scoring": "sigmoid"},
            "scoring is 'sigmoid'; it must be softmax with sinkhorn_weights plan",
        ),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)


def test_start_is_an_input_only():
    assert START == 256 and VOCAB_SIZE == 257
    assert make(tiny_model())(torch.tensor([[START]]))[0].shape == (1, 1, 256)
