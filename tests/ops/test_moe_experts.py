import pytest
import torch

from sparsemoe.ops import moe
from tests.ops.expert_cases import (
    DTYPES,
    RAGGED,
    SIZES,
    Inputs,
    check,
    layer,
    near,
    ragged_plan,
)
from tests.ops.moe_cases import HALVES, routed


@pytest.mark.parametrize("hidden, inner", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_ragged_experts(device, dtype, hidden, inner):
    plan, weights = ragged_plan(RAGGED, device)
    check(layer(sum(RAGGED), hidden, inner, len(RAGGED), device, dtype, weights), plan)


@pytest.mark.parametrize("top_k", range(1, 9))
def test_every_number_of_choices(device, top_k):
    experts, weights = routed(90, 9, top_k, device, skew=2.0)
    check(layer(90, 72, 40, 9, device, torch.bfloat16, weights), moe.plan(experts, 9))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_activation(device, dtype, activation, bias):
    experts, weights = routed(60, 5, 2, device, skew=1.5)
    inputs = layer(60, 48, 24, 5, device, dtype, weights, activation=activation, bias=bias)
    check(inputs, moe.plan(experts, 5), activation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_dropped_pairs(device, dtype, bias):
    """Rows that no pair needs come last, and dropped pairs get the gradient zero."""
    experts, weights = routed(150, 5, 2, device, skew=1.5)
    experts[7] = -1
    plan = moe.plan(experts, 5, capacity=40)
    inputs = layer(150, 48, 40, 5, device, dtype, weights, bias=bias)
    check(inputs, plan)
    dropped = plan.token_rows < 0
    assert dropped.any() and (inputs.weights.grad[dropped] == 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_that_choose(device, dtype, bias):
    """Repeated tokens, tokens that no expert takes, and rows without token in the middle."""
    chosen = torch.randint(-1, 60, (6, 33), dtype=torch.int32, device=device)
    chosen[2], chosen[3, :4] = -1, 11
    plan = moe.plan_from_tokens(chosen, 70)
    weights = torch.rand(6, 33, device=device)
    check(layer(70, 40, 72, 6, device, dtype, weights, bias=bias), plan)
    check(layer(70, 40, 72, 6, device, dtype, bias=bias), plan)  # no weights


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_weights(device, dtype):
    experts, _ = routed(50, 7, 3, device)
    check(layer(50, 64, 32, 7, device, dtype, bias=True), moe.plan(experts, 7))


@pytest.mark.parametrize("n_tokens", [1, 2, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_tokens(device, dtype, n_tokens):
    """Too few for every thread or multiprocessor to get an expert."""
    for hidden, inner, top_k in ((136, 264, 1), (264, 136, 4)):
        experts, weights = routed(n_tokens, 16, top_k, device)
        inputs = layer(n_tokens, hidden, inner, 16, device, dtype, weights)
        check(inputs, moe.plan(experts, 16))


@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows(device, dtype, activation):
    """As many as experts at most: the GPU has kernels of its own for these. A row
    of a weight's gradient is then often of one token, whose rounding nothing averages."""
    width = {"activation": activation, "bias": True}
    for hidden, inner, n_tokens, top_k in ((520, 72, 4, 8), (37, 29, 5, 3), (24, 264, 1, 32)):
        experts, weights = routed(n_tokens, 40, top_k, device)
        inputs = layer(n_tokens, hidden, inner, 40, device, dtype, weights, **width)
        check(inputs, moe.plan(experts, 40), activation, slack=2)
    experts, weights = routed(6, 40, 5, device)
    experts[1], experts[2:, 0] = -1, 7  # one expert has several rows
    inputs = layer(6, 72, 40, 40, device, dtype, weights, **width)
    check(inputs, moe.plan(experts, 40, capacity=3), activation, slack=2)
    chosen = torch.randint(-1, 9, (20, 1), dtype=torch.int32, device=device)
    inputs = layer(9, 72, 40, 20, device, dtype, torch.rand(20, 1, device=device), **width)
    check(inputs, moe.plan_from_tokens(chosen, 9), activation, slack=2)


@pytest.mark.parametrize("hidden, inner", [(1032, 264), (517, 131), (517, 29)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_wide_layers(device, dtype, hidden, inner):
    """More than the GPU's blocks make at once and keep in shared memory."""
    experts, weights = routed(16, 32, 2, device)
    inputs = layer(16, hidden, inner, 32, device, dtype, weights, bias=inner > 64)
    check(inputs, moe.plan(experts, 32), slack=2)


def test_few_rows_without_width(device):
    """Then only the second bias is left. So many experts that a GPU still makes the plan when the
    next kernel begins."""
    for _ in range(3):  # the third plan lies where the first lay
        experts, weights = routed(8, 1024, 4, device)
        inputs = layer(8, 24, 0, 1024, device, torch.float32, weights, bias=True)
        expected = (weights[..., None] * inputs.down_bias[experts.long()]).sum(1)
        if device == "cuda":
            torch.cuda._sleep(2_000_000)  # both kernels are launched before the first begins
        torch.testing.assert_close(inputs.run(moe.plan(experts, 1024)), expected)


def test_few_rows_of_a_plan_changed_by_hand(device):
    """Rows out of range stand for none. A negative offset, which the CPU refuses, gives no rows."""
    experts, weights = routed(3, 12, 4, device)
    inputs = layer(3, 24, 40, 12, device, torch.float32, weights, bias=True)
    plan, kept = moe.plan(experts, 12), weights.clone()
    for token, entry, row in ((1, 2, -1), (2, 0, 99)):
        plan.token_rows[token, entry], kept[token, entry] = row, 0
    expected = inputs._replace(weights=kept).expected(moe.plan(experts, 12))
    if device == "cuda":
        plan.offsets[0] = -5
    torch.testing.assert_close(inputs.run(plan), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("hidden, inner", [(64, 520), (200, 64)])
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
@pytest.mark.parametrize("dtype", HALVES)
def test_more_tiles_than_run_at_once(device, dtype, activation, hidden, inner):
    """The GPU's blocks then take several each, and ask for the next."""
    counts = [(37 * e * e + 11 * e) % 301 for e in range(60)]
    counts[5:9], counts[20], counts[59] = [0, 64, 0, 128], 1, 40
    plan, weights = ragged_plan(counts, device)
    inputs = layer(sum(counts), hidden, inner, 60, device, dtype, weights, activation=activation)
    check(inputs, plan, activation, slack=2)


@pytest.mark.parametrize("counts", [[2100, 0, 5], [1030, 90, 80, 70, 60, 1], [520, 530, 540, 510]])
@pytest.mark.parametrize("recompute", [False, True])
def test_large_experts(device, counts, recompute):
    """More rows than go through a step at once, and an expert that needs all threads."""
    plan, weights = ragged_plan(counts, device)
    inputs = layer(sum(counts), 24, 40, len(counts), device, torch.float32, weights, bias=True)
    check(inputs, plan, recompute=recompute)


def test_any_number_of_threads():
    plan, weights = ragged_plan([900, 3, 400, 0, 200, 20], "cpu")
    threads = torch.get_num_threads()
    try:
        for n in (1, 3, 8):
            torch.set_num_threads(n)
            check(layer(1523, 40, 72, 6, "cpu", torch.float32, weights, bias=True), plan)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("case", ["no tokens", "one expert takes all", "no expert"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_routing(device, dtype, case):
    n_tokens = 0 if case == "no tokens" else 150
    chosen = {"one expert takes all": 2, "no expert": -1}.get(case, 0)
    experts = torch.full((n_tokens, 1), chosen, dtype=torch.int32, device=device)
    weights = torch.rand(n_tokens, 1, device=device)
    inputs = layer(n_tokens, 16, 8, 4, device, dtype, weights, bias=True)
    check(inputs, moe.plan(experts, 4))
    used = inputs.gate_up_proj.grad.flatten(1).norm(dim=1) > 0
    assert used.tolist() == [False, False, chosen == 2, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_token_stays_alone(device, dtype, bad):
    experts, weights = routed(140, 8, 2, device)
    plan = moe.plan(experts, 8)
    inputs = layer(140, 64, 40, 8, device, dtype, weights)
    clean = inputs.run(plan).detach()
    with torch.no_grad():
        inputs.x[9] = bad
    y = inputs.run(plan)
    others = torch.arange(140, device=device) != 9
    assert not y[9].isfinite().all() and torch.equal(y[others], clean[others])
    y.sum().backward()
    assert inputs.x.grad[others].isfinite().all() and inputs.weights.grad[others].isfinite().all()
    spared = torch.ones(8, dtype=torch.bool, device=device)
    spared[experts[9].long()] = False
    for grad in (inputs.gate_up_proj.grad, inputs.down_proj.grad):
        assert grad[spared].isfinite().all() and not grad[~spared].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_bad_expert_without_rows_does_no_harm(device, dtype):
    experts, weights = routed(140, 4, 2, device)
    inputs = layer(140, 64, 40, 6, device, dtype, weights, bias=True)
    with torch.no_grad():
        for t in inputs[1:5]:
            t[4:] = torch.nan
    y = inputs.run(moe.plan(experts, 6))
    y.sum().backward()
    assert y.isfinite().all() and all(g.isfinite().all() for g in inputs.grads().values())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [False, True])
def test_no_less_exact_than_eager_code(device, dtype, bias):
    experts, weights = routed(400, 6, 2, device, skew=1.0)
    plan = moe.plan(experts, 6)
    inputs = layer(400, 136, 264, 6, device, dtype, weights, bias=bias)
    eager, exact = inputs.to(dtype), inputs.to(torch.float64)
    upstream = torch.randn(400, 136, device=device).to(dtype)
    results = []
    for leaves, y in (
        (inputs, inputs.run(plan)),
        (eager, eager.expected(plan)),
        (exact, exact.expected(plan)),
    ):
        y.backward(upstream.to(y.dtype))
        results.append({"y": y.detach(), **leaves.grads()})
    for name, wanted in results[2].items():
        ours, theirs = ((r[name].double() - wanted).norm() / wanted.norm() for r in results[:2])
        assert ours <= 1.05 * theirs, f"{name}: {ours:.3g}, eager {theirs:.3g}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("n_tokens", [200, 4])
def test_recomputing_gives_the_same_bits_and_keeps_no_rows(device, dtype, activation, n_tokens):
    experts, weights = routed(n_tokens, 9, 2, device, skew=2.0)
    plan = moe.plan(experts, 9, capacity=150)
    n_rows = plan.row_token.numel()
    inputs = layer(n_tokens, 136, 72, 9, device, dtype, weights, activation=activation, bias=True)
    grads, kept = [], []
    for recompute in (False, True):
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, shapes=shapes: shapes.append(t.shape) or t, lambda t: t
        ):
            y = inputs.run(plan, activation, recompute=recompute)
        leaves = list(inputs.given().values())
        grads.append([y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)])
        kept.append(any(len(s) == 2 and s[0] == n_rows for s in shapes))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    assert kept == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("which", [(True, True), (True, False), (False, True)])
def test_gradients_into_sums(device, dtype, which):
    plan, weights = ragged_plan([40, 0, 130, 3], device)
    inputs = layer(173, 40, 72, 4, device, dtype, weights, bias=True)
    exact = inputs.to(torch.float64)
    sums = [torch.randn(t.shape, device=device) for t in inputs[1:3]]
    sums = [total if w else None for total, w in zip(sums, which, strict=True)]
    before = [None if s is None else s.clone() for s in sums]
    upstream = torch.randn(173, 40, device=device).to(dtype)
    y = inputs.run(plan, main_grads=tuple(sums))
    for _ in range(2):
        y.backward(upstream, retain_graph=True)
    exact.expected(plan).backward(upstream.double() * 2)
    for name, total, old in zip(("gate_up_proj", "down_proj"), sums, before, strict=True):
        wanted = getattr(exact, name).grad
        if total is None:
            near(name, getattr(inputs, name).grad, wanted, dtype)
        else:
            assert getattr(inputs, name).grad is None
            near(name, total.double() - old, wanted, dtype)
            assert torch.equal(total[1], old[1])  # the expert without rows
    for name in ("x", "gate_up_bias", "down_bias", "weights"):
        near(name, getattr(inputs, name).grad, getattr(exact, name).grad, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_frozen_inputs(device, dtype, recompute):
    """Each gradient is the same whichever others are wanted."""
    experts, weights = routed(60, 5, 2, device)
    plan = moe.plan(experts, 5)
    inputs = layer(60, 40, 24, 5, device, dtype, weights, bias=True)
    inputs.run(plan).sum().backward()
    everything = inputs.grads()
    names = list(everything)
    for wanted in (*([n] for n in names), names[:3], names[1:3], ["x", "weights"]):
        for name, t in inputs.given().items():
            t.requires_grad_(name in wanted)
            t.grad = None
        inputs.run(plan, recompute=recompute).sum().backward()
        for name, grad in inputs.grads().items():
            assert (grad is not None) == (name in wanted), name
            assert grad is None or torch.equal(grad, everything[name]), name


def test_nothing_is_kept_without_gradient(device):
    experts, weights = routed(30, 5, 2, device)
    inputs = layer(30, 16, 8, 5, device, torch.float32, weights)
    with torch.no_grad():
        assert not inputs.run(moe.plan(experts, 5)).requires_grad
    with torch.inference_mode():
        inputs.run(moe.plan(experts, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_gradients_and_two_backward_passes(device, dtype):
    experts, weights = routed(40, 5, 2, device)
    plan = moe.plan(experts, 5)
    inputs = layer(40, 24, 16, 5, device, dtype, weights, bias=True)
    y = inputs.run(plan)
    y.sum().backward(retain_graph=True)
    first = {name: grad.clone() for name, grad in inputs.grads().items()}
    y.backward(torch.ones_like(y))
    assert all(torch.equal(grad, 2 * first[name]) for name, grad in inputs.grads().items())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", moe.ACTIVATIONS)
def test_gradient_in_float64(activation, recompute):
    experts, weights = routed(6, 3, 2, "cpu")
    chosen = torch.tensor([[0, 2, 2], [-1, 5, 1], [-1, -1, -1]], dtype=torch.int32)
    for plan, w in (
        (moe.plan(experts, 3, capacity=3), weights),
        (moe.plan_from_tokens(chosen, 6), torch.rand(3, 3)),
    ):
        inputs = layer(6, 4, 3, 3, "cpu", torch.float64, w, activation=activation, bias=True)
        assert torch.autograd.gradcheck(
            lambda *t, p=plan: Inputs(*t).run(p, activation, recompute=recompute), tuple(inputs)
        )


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_unset_memory_is_read(device, dtype, recompute):
    experts, weights = routed(40, 5, 2, device)
    experts[:20] = -1
    plan = moe.plan(experts, 8, capacity=9)
    for hidden, inner in ((24, 16), (136, 264)):
        inputs = layer(40, hidden, inner, 8, device, dtype, weights, bias=True)
        check(inputs, plan, poisoned=True, recompute=recompute)


@pytest.mark.parametrize("n_experts", [2, 8])
def test_a_row_out_of_range_is_none(device, n_experts):
    """In a plan that was not made by plan(): nothing is read or written out of bounds."""
    plan = moe.plan(torch.tensor([[0], [1], [1]], dtype=torch.int32, device=device), n_experts)
    inputs = layer(3, 8, 8, n_experts, device, torch.float32, torch.rand(3, 1, device=device))
    expected = inputs.run(plan).detach()
    big = 2**30
    plan.row_token[2], plan.row_pair[2], plan.token_rows[2, 0] = big, big, big
    y = inputs.run(plan)
    assert torch.equal(y[:2], expected[:2]) and (y[2] == 0).all()
    y.sum().backward()
    assert all(g.isfinite().all() for g in inputs.grads().values())
    assert (inputs.x.grad[2] == 0).all() and inputs.weights.grad[2] == 0
