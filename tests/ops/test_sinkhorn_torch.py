"""The sinkhorn op under torch's machinery: opcheck, compile, export, autocast, CUDA graphs."""

import pytest
import torch

from sparsemoe.ops.sinkhorn import sinkhorn
from tests.ops.moe_cases import close
from tests.ops.sinkhorn_cases import marginals, skewed_by_10

OPS = torch.ops.sparsemoe


def calls(device):
    """name -> (op, arguments) with logits that require grad."""
    few, many = (torch.randn(s, device=device) for s in ((3, 6, 4), (2, 70, 9)))
    mask = torch.arange(70, device=device).expand(2, 70) % 4 != 1
    rows, columns = marginals((2, 70, 9), device)
    columns *= (rows * mask).sum(-1, keepdim=True) / columns.sum(-1, keepdim=True)
    options = 0.05, 0.7, rows, columns, mask
    plan, *_, state, history = OPS.sinkhorn(many, 5, *options, True, True)
    again = OPS.sinkhorn(few, 5)
    plain = None, 1.0, None, None, None
    few, many, skewed = (t.requires_grad_() for t in (few, many, skewed_by_10((300, 9), device)))
    return {
        "small": (OPS.sinkhorn, (few,)),
        "small, kept": (OPS.sinkhorn, (few, 4, *plain, True, True)),
        "small, ends early": (OPS.sinkhorn, (few, 9, 0.1)),
        "large": (OPS.sinkhorn, (many, 3)),
        "large, all options": (OPS.sinkhorn, (many, 5, *options, True, True)),
        "bfloat16": (OPS.sinkhorn, (many.detach().bfloat16().requires_grad_(), 5, *options, True)),
        "out of range": (OPS.sinkhorn, (skewed, 5)),
        "backward": (OPS.sinkhorn_backward, (plan, many.detach(), 5, *options, state, history)),
        "backward, small": (
            OPS.sinkhorn_backward,
            (again[0], few.detach(), 5, *plain, *again[4:]),
        ),
    }


NAMES = list(calls("cpu"))


def leaves(result):
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]


def run(op, arguments):
    """The results, and the gradients."""
    inputs = [a for a in arguments if isinstance(a, torch.Tensor) and a.requires_grad]
    result = leaves(op(*arguments))
    loss = sum(t.double().square().sum() for t in result if t.requires_grad)
    grads = torch.autograd.grad(loss, inputs) if inputs else ()
    return [t.detach() for t in (*result, *grads)]


@pytest.mark.parametrize("name", NAMES)
def test_opcheck(device, name):
    op, arguments = calls(device)[name]
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", [name for name in NAMES if "backward" not in name])
def test_a_bare_call_is_differentiable(device, name):
    op, (logits, *others) = calls(device)[name]
    grad = run(op, (logits, *others))[-1]
    assert grad.shape == logits.shape and grad.dtype == logits.dtype and grad.abs().sum() > 0


@pytest.mark.parametrize("name", NAMES)
def test_same_bits_on_every_run(device, name):
    op, arguments = calls(device)[name]
    runs = [run(op, arguments) for _ in range(3)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


@pytest.mark.parametrize("shape", [(9000, 64), (4000, 4, 4), (40, 300, 16), (500, 1024)])
def test_same_bits_of_large_problems(device, shape):
    logits = torch.randn(shape, device=device)

    def once():
        leaf = logits.clone().requires_grad_()
        found = sinkhorn(leaf, return_scalings=True)
        found.plan.square().sum().backward()
        return (*found, leaf.grad)

    runs = [once() for _ in range(4)]
    assert all(torch.equal(a, b) for other in runs[1:] for a, b in zip(other, runs[0], strict=True))


def balanced(logits):
    """As a router uses the op in training."""
    return sinkhorn(logits, 6, return_scalings=True)


def with_all_options(logits):
    mask = torch.arange(logits.shape[-2], device=logits.device).expand(logits.shape[:-1]) % 3 != 1
    rows = torch.full(logits.shape[:-1], 0.5, device=logits.device)
    columns = (rows * mask).sum(-1, keepdim=True) / logits.shape[-1]
    columns = columns.expand(logits.shape[0], logits.shape[-1])
    return sinkhorn(logits, 9, 0.01, 0.5, rows, columns, mask, return_scalings=True, check=False)


def implicit(logits):
    return (sinkhorn(logits, 20, gradient="implicit"),)


FUNCTIONS = [balanced, with_all_options, implicit]


def trained(function, logits):
    """Results and gradient."""
    leaf = logits.detach().clone().requires_grad_()
    found = function(leaf)
    found[0].square().sum().backward()
    return [t.detach() for t in (*found, leaf.grad)]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_compile_without_a_graph_break(device, function):
    compiled = torch.compile(function, fullgraph=True, dynamic=True)
    for shape in ((4, 80, 9), (3, 100, 9), (5, 6, 9)):
        logits = torch.randn(shape, device=device)
        for a, b in zip(trained(compiled, logits), trained(function, logits), strict=True):
            assert a.dtype == b.dtype
            close(a.float(), b.float())


@pytest.mark.parametrize("function", FUNCTIONS)
def test_export(device, function):
    class Layer(torch.nn.Module):
        def forward(self, logits):
            return function(logits)

    given = torch.randn(4, 80, 9, device=device)
    sizes = {0: torch.export.Dim("batch", min=2), 1: torch.export.Dim("tokens", min=2)}
    exported = torch.export.export(Layer(), (given,), dynamic_shapes=(sizes,)).module()
    for logits in (given, torch.randn(7, 100, 9, device=device)):
        for a, b in zip(exported(logits), function(logits), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_autocast_changes_nothing(device, function):
    logits = torch.randn(4, 80, 9, device=device)
    plain = trained(function, logits)
    with torch.autocast(device, torch.bfloat16):
        cast = trained(function, logits)
        half = sinkhorn(logits.bfloat16())
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(cast, plain, strict=True))
    assert half.dtype == torch.float32


def test_meta_tensors():
    for shape in ((3, 6, 4), (2, 70, 9), (0, 4)):
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            for keep in (False, True):
                given = 5, None, 1.0, None, None, None, keep, not keep
                real = OPS.sinkhorn(torch.randn(shape).to(dtype), *given)
                with torch._subclasses.FakeTensorMode():
                    fake = OPS.sinkhorn(torch.empty(shape, dtype=dtype), *given)
                for a, b in zip(fake, real, strict=True):
                    assert a.shape == b.shape and a.dtype == b.dtype and a.stride() == b.stride()


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
GPU_SHAPES = [(4096, 64), (3, 6, 4), (2000, 4, 4), (2, 700, 33), (9000, 256)]


def captured(function):
    """A CUDA graph of the function, and its results, which a replay fills."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = function()
    return graph, found


@needs_gpu
@pytest.mark.parametrize("tolerance", [None, 0.01])
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_a_training_step_in_a_cuda_graph(shape, tolerance):
    leaf = torch.randn(shape, device="cuda").requires_grad_()

    def step():
        leaf.grad = None
        found = sinkhorn(leaf, 8, tolerance, return_scalings=True)
        found.plan.square().sum().backward()
        return (*found, leaf.grad)

    graph, found = captured(step)
    for scale in (1, 3, 20):  # also where the work goes on with logarithms
        with torch.no_grad():
            leaf.copy_(scale * torch.randn(shape, device="cuda"))
        graph.replay()
        replayed = [t.clone() for t in found]
        assert all(torch.equal(a, b) for a, b in zip(replayed, step(), strict=True))


@needs_gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_no_host_sync(shape):
    logits = torch.randn(shape, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in ({}, {"tolerance": 0.1}, {"gradient": "implicit"}):
            leaf = logits.clone().requires_grad_()
            found = sinkhorn(leaf, return_scalings=True, **options)
            found.plan.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_the_current_stream_is_used(shape):
    logits = torch.randn(shape, device="cuda")
    expected = trained(balanced, logits)
    buffer = torch.zeros_like(logits)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        buffer.copy_(logits)
        found = trained(balanced, buffer)
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
