"""Every moe op under torch's machinery: opcheck, compile, export, autocast, CUDA graphs."""

import pytest
import torch

from sparsemoe.ops import moe
from tests.ops.moe_cases import routed

OPS = torch.ops.sparsemoe


def sliced(plan):
    """The tensors that experts takes."""
    return plan.offsets, *plan[2:]


def calls(device):
    """name -> (op, arguments) with tensors that require grad where they may."""
    logits = torch.randn(20, 12, device=device, requires_grad=True)
    mask = torch.rand(20, device=device) > 0.2
    experts, weights = routed(20, 12, 3, device)
    plan = moe.plan(experts, 12)
    capped = moe.plan(experts, 12, capacity=3)
    chosen = moe.expert_choice(logits, 4, n_groups=2)
    by_token = moe.plan_from_tokens(chosen.tokens, 20)
    x = torch.randn(20, 16, device=device, requires_grad=True)
    rows = torch.randn(60, 16, device=device, requires_grad=True)
    few = torch.randn(36, 16, device=device, requires_grad=True)
    many = torch.randn(96, 16, device=device, requires_grad=True)
    w = weights.clone().requires_grad_()
    stack = torch.randn(12, 16, 8, device=device, requires_grad=True)
    by_column = torch.randn(12, 8, 16, device=device).mT.requires_grad_()
    up, down = (
        torch.randn(12, *size, device=device, requires_grad=True) for size in ((24, 16), (16, 12))
    )
    up_bias, down_bias = (torch.randn(12, n, device=device, requires_grad=True) for n in (24, 16))
    biases, no_biases = (up_bias, down_bias), (None, None)
    up_columns, down_columns = (t.detach().mT.contiguous().mT.requires_grad_() for t in (up, down))
    y_grad = torch.randn(20, 16, device=device)
    fixed_layer = [t.detach() for t in (x, up, down, up_bias, down_bias, w)]
    fixed_by_column = [x.detach(), up_columns.detach(), down_columns.detach(), *fixed_layer[3:]]
    pre = torch.randn(60, 24, device=device)
    sums = [torch.zeros(t.shape, device=device) for t in (up, down)]
    lse = torch.randn(20, device=device, requires_grad=True)
    bias = torch.randn(12, device=device)
    fixed = torch.zeros(12, device=device)
    threshold = torch.full((12,), 0.02, device=device)
    return {
        "gate": (OPS.gate, (logits, 3)),
        "gate, all options": (
            OPS.gate,
            (logits, 3, "sigmoid", True, 2.5, bias, 4, 2, threshold, mask),
        ),
        "expert_choice": (OPS.expert_choice, (logits, 4, 2, mask)),
        "plan": (OPS.plan, (experts, 12)),
        "plan, capacity": (OPS.plan, (experts, 12, 3, weights)),
        "plan_from_tokens": (OPS.plan_from_tokens, (chosen.tokens, 20)),
        "dispatch": (OPS.dispatch, (x, *plan[2:])),
        "dispatch, expert choice": (OPS.dispatch, (x, *by_token[2:])),
        "combine": (OPS.combine, (rows, w, *plan[2:])),
        "combine, no weights": (OPS.combine, (rows, None, *plan[2:])),
        "combine, capacity": (OPS.combine, (few, w, *capped[2:])),
        "combine, expert choice": (OPS.combine, (many, chosen.weights.detach(), *by_token[2:])),
        "experts": (OPS.experts, (x, up, down, *no_biases, w, *sliced(plan), "swiglu", True)),
        "experts, projections by column": (
            OPS.experts,
            (x, up_columns, down_columns, *no_biases, w, *sliced(plan), "swiglu", True),
        ),
        "experts, biases": (
            OPS.experts,
            (x, up, down, *biases, w, *sliced(plan), "geglu", True),
        ),
        "experts, nothing kept": (
            OPS.experts,
            (x, up, down, *biases, None, *sliced(capped), "swiglu", False),
        ),
        "experts, expert choice": (
            OPS.experts,
            (x, up, down, *biases, chosen.weights.detach(), *sliced(by_token), "swiglu", True),
        ),
        "experts_backward": (
            OPS.experts_backward,
            (y_grad, *fixed_layer, *sliced(plan), "swiglu", pre, True, True, True, None, None),
        ),
        "experts_backward, projections by column": (
            OPS.experts_backward,
            (y_grad, *fixed_by_column, *sliced(plan), "swiglu", pre, True, True, True, None, None),
        ),
        "experts_backward, into sums": (
            OPS.experts_backward,
            (y_grad, *fixed_layer, *sliced(plan), "swiglu", pre, True, True, True, *sums),
        ),
        "experts_backward, in part": (
            OPS.experts_backward,
            (
                y_grad,
                *fixed_layer,
                *sliced(plan),
                "swiglu",
                pre[0, :0],
                False,
                True,
                False,
                None,
                None,
            ),
        ),
        "grouped_mm": (OPS.grouped_mm, (rows, stack, plan.offsets)),
        "grouped_mm, by column": (OPS.grouped_mm, (rows, by_column, plan.offsets)),
        "grouped_mm_backward_b": (OPS.grouped_mm_backward_b, (rows, rows, plan.offsets, False)),
        "grouped_mm_backward_b, by column": (
            OPS.grouped_mm_backward_b,
            (rows, many[:60, :8].detach(), plan.offsets, True),
        ),
        "load_balance_loss": (OPS.load_balance_loss, (logits, plan.counts, mask)),
        "router_z_loss": (OPS.router_z_loss, (lse, mask)),
        "update_expert_bias_": (OPS.update_expert_bias_, (fixed, plan.counts, 0.1)),
    }


NAMES = list(calls("cpu"))


def leaves(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def differentiable(result):
    return sum(t.double().square().sum() for t in leaves(result) if t.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name):
    op, arguments = calls(device)[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", NAMES)
def test_a_bare_call_is_differentiable(device, name):
    op, arguments = calls(device)[name]
    wanted = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    if wanted:
        grads = torch.autograd.grad(differentiable(op(*arguments)), wanted)
        assert all(
            g.shape == a.shape and g.abs().sum() > 0 for g, a in zip(grads, wanted, strict=True)
        )


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_every_run(device, name):
    op, arguments = calls(device)[name]
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    first = None
    for _ in range(3):
        fresh = [
            a.clone()
            if a is not None and not isinstance(a, (int, float, str)) and not a.requires_grad
            else a
            for a in arguments
        ]
        result = leaves(op(*fresh))
        if inputs:
            result += torch.autograd.grad(differentiable(op(*fresh)), inputs)
        if first is not None:
            assert all(torch.equal(a, b) for a, b in zip(result, first, strict=True))
        first = result


def whole_layer(x, router, up, down, capacity):
    """Every op of token choice, as a layer uses them."""
    logits = x.float() @ router
    weights, experts, logsumexp = moe.gate(logits, 2, renormalize=True)
    plan = moe.plan(experts, 8, capacity=capacity)
    y = moe.experts(x, up, down, plan, weights)
    loss = moe.load_balance_loss(logits, plan.counts) + moe.router_z_loss(logsumexp)
    return y, loss


def by_expert_choice(x, router, up, down, capacity):
    logits = x.float() @ router
    chosen = moe.expert_choice(logits, capacity or 5, n_groups=2)
    plan = moe.plan_from_tokens(chosen.tokens, x.shape[0])
    return moe.experts(x, up, down, plan, chosen.weights), logits.mean()


def with_all_options(x, router, up, down, capacity):
    """Biases, a recomputed first projection, and a product of one's own."""
    weights, experts, logsumexp = moe.gate(x.float() @ router, 2, scoring="sigmoid")
    plan = moe.plan(experts, 8, capacity=capacity)
    biases = {"gate_up_bias": up[:, :, 0], "down_bias": down[:, :, 0]}
    y = moe.experts(x, up, down, plan, weights, "geglu", recompute=True, **biases)
    rows = moe.grouped_mm(moe.dispatch(x, plan), down.mT, plan.offsets)
    return y + moe.combine(rows, plan, weights), moe.router_z_loss(logsumexp)


FUNCTIONS = [whole_layer, by_expert_choice, with_all_options]


def layer_inputs(device, n_tokens=32, dtype=torch.bfloat16):
    x = torch.randn(n_tokens, 16, device=device, dtype=dtype)
    router = torch.randn(16, 8, device=device)
    up = torch.randn(8, 32, 16, device=device, dtype=dtype)
    down = torch.randn(8, 16, 16, device=device, dtype=dtype)
    return [t.requires_grad_() for t in (x, router, up, down)]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("capacity", [None, 6])
def test_compile_without_a_graph_break(device, function, capacity):
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for n_tokens in (32, 48):
        inputs = layer_inputs(device, n_tokens)
        y, loss = function(*inputs, capacity)
        expected = torch.autograd.grad(y.float().square().mean() + loss, inputs)
        y_compiled, loss_compiled = compiled(*inputs, capacity)
        actual = torch.autograd.grad(y_compiled.float().square().mean() + loss_compiled, inputs)
        # compiled code keeps in float32 what eager code rounds to bfloat16
        assert (y_compiled - y).norm() <= 1e-2 * y.norm()
        torch.testing.assert_close(loss_compiled, loss)
        for a, b in zip(actual, expected, strict=True):
            assert (a - b).norm() <= 3e-2 * b.norm() + 1e-6


def test_compile_with_gradients_into_sums(device):
    x, router, up, down = layer_inputs(device)
    experts = (x @ router.to(x)).topk(2).indices.int()
    totals = []
    for compiled in (False, True):
        sums = torch.zeros(up.shape, device=device), torch.zeros(down.shape, device=device)

        def loss(x, up, down, experts, sums):
            y = moe.experts(x, up, down, moe.plan(experts, 8), main_grads=sums)
            return y.float().square().sum()

        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if compiled else loss
        run(x, up, down, experts, sums).backward()
        assert up.grad is None and down.grad is None
        totals.append(sums)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*totals, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_export(device, function):
    class Layer(torch.nn.Module):
        def forward(self, x, router, up, down):
            return function(x, router, up, down, None)

    inputs = [t.detach() for t in layer_inputs(device)]
    exported = torch.export.export(Layer(), tuple(inputs))
    for a, b in zip(exported.module()(*inputs), function(*inputs, None), strict=True):
        assert torch.equal(a, b)


def test_autocast(device):
    x, router, up, down = layer_inputs(device, dtype=torch.float32)
    with torch.autocast(device, torch.bfloat16):
        logits = x @ router
        assert logits.dtype == torch.bfloat16
        gated = moe.gate(logits, 2)
        assert gated.weights.dtype == torch.float32
        assert torch.equal(gated.weights, moe.gate(logits.float(), 2).weights)
        y = moe.experts(x, up, down, moe.plan(gated.experts, 8), gated.weights)
        assert y.dtype == torch.bfloat16
        chosen = moe.expert_choice(logits, 4)
        assert chosen.weights.dtype == torch.float32
        assert moe.router_z_loss(gated.logsumexp).dtype == torch.float32
        biases = {"gate_up_bias": up[:, :, 0], "down_bias": down[:, :, 0]}
        plan = moe.plan(gated.experts, 8)
        assert moe.experts(x, up, down, plan, **biases).dtype == torch.bfloat16
        product = moe.grouped_mm(moe.dispatch(x, plan), down.mT, plan.offsets)
        assert product.dtype == torch.bfloat16
        wide = [t.detach().cpu().double() for t in (x, up, down)]
        host_plan = type(plan)(*(None if t is None else t.cpu() for t in plan))
        assert moe.experts(*wide, host_plan).dtype == torch.float64
    y.float().sum().backward()
    assert x.grad.dtype == up.grad.dtype == torch.float32


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@needs_gpu
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("capacity, n_tokens", [(None, 32), (6, 32), (None, 9000)])
def test_a_training_step_in_a_cuda_graph(function, capacity, n_tokens):
    """With many tokens, Hopper's kernels hand out tiles by a counter, which a replay must clear."""
    inputs = layer_inputs("cuda", n_tokens)

    def step():
        for t in inputs:
            t.grad = None
        y, loss = function(*inputs, capacity)
        (y.float().square().mean() + loss).backward()
        return y, loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y, loss = step()
    captured = [t.grad for t in inputs]
    for _ in range(2):
        with torch.no_grad():
            inputs[0].copy_(torch.randn_like(inputs[0]))
        graph.replay()
        replayed = [t.clone() for t in (y, loss, *captured)]
        fresh = [t.detach().clone().requires_grad_() for t in inputs]
        y_now, loss_now = function(*fresh, capacity)
        (y_now.float().square().mean() + loss_now).backward()
        for a, b in zip(replayed, [y_now, loss_now, *(t.grad for t in fresh)], strict=True):
            assert torch.equal(a, b)


def replayed(function):
    """function, but from a CUDA graph; the result is the same tensors every time."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()

    def replay():
        graph.replay()
        return found

    return replay


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("last", ["kernel", "host copy", "clear", "other stream"])
def test_kernels_launched_early_wait_for_the_last(last, captured):
    """Those for few rows begin before it has ended, also in a CUDA graph, whatever it is. More
    weights than a cache holds, so that they are late where a kernel fails to wait for them."""
    up, down = (
        (torch.randn(32, *size, device="cuda") / 32).bfloat16()
        for size in ((4096, 512), (512, 2048))
    )
    x, weights = torch.zeros_like(down[0, :4, :512]), torch.rand(4, 4, device="cuda")
    host = torch.zeros(4, 4, dtype=torch.int32).pin_memory()
    chosen, experts = torch.zeros_like(host, device="cuda"), torch.zeros_like(host, device="cuda")
    side = torch.cuda.Stream()

    def layer(x):
        return moe.experts(x, up, down, moe.plan(experts, 32), weights)

    def step():
        up.neg_()
        x.copy_(32 * up[3, :4])
        if last == "kernel":
            torch.add(chosen, 1, out=experts)
        elif last == "host copy":
            experts.copy_(host, non_blocking=True)
        elif last == "clear":
            experts.zero_()
        else:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                torch.add(chosen, 1, out=experts)
            torch.cuda.current_stream().wait_stream(side)
        y = layer(x)
        down.neg_()
        return y, layer(y)

    run = replayed(step) if captured else step
    for _ in range(5):
        host.copy_(torch.randint(0, 31, (4, 4)))
        chosen.copy_(host)
        torch.cuda.synchronize()
        found = [y.clone() for y in run()]
        torch.cuda.synchronize()
        down.neg_()
        expected = [layer(x)]
        torch.cuda.synchronize()
        down.neg_()
        expected.append(layer(expected[0]))
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b) and a.abs().sum() > 1


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_layers_launched_early_one_after_the_other(captured):
    """Nothing runs between them, and their plans lie where earlier ones lay."""
    up, down = (torch.randn(64, *size, device="cuda").bfloat16() for size in ((128, 72), (72, 64)))
    x, weights = torch.randn(4, 72, device="cuda").bfloat16(), torch.rand(4, 8, device="cuda")
    choices = [torch.randint(0, 64, (4, 8), device="cuda").int() for _ in range(40)]

    def layer(experts):
        return moe.experts(x, up, down, moe.plan(experts, 64), weights)

    def layers():
        return [layer(experts) for experts in choices]

    expected = []
    for experts in choices:
        expected.append(layer(experts))
        torch.cuda.synchronize()
    run = replayed(layers) if captured else layers
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(), expected, strict=True))


@needs_gpu
@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_host_sync(function):
    inputs = layer_inputs("cuda")
    bias = torch.zeros(8, device="cuda")
    counts = torch.ones(8, device="cuda", dtype=torch.int32)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for capacity in (None, 6):
            y, loss = function(*inputs, capacity)
            (y.float().square().mean() + loss).backward()
        moe.update_expert_bias_(bias, counts, 0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_the_current_stream_is_used():
    logits = torch.randn(4096, 64, device="cuda")
    expected = moe.gate(logits, 4).weights
    side = torch.cuda.Stream()
    buffer = torch.empty_like(logits)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        buffer.copy_(logits)
        weights = moe.gate(buffer, 4).weights
    side.synchronize()
    assert torch.equal(weights, expected)
