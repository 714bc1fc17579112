import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.ops._router_linear import _terms
from sparsemoe.reference import moe as reference

FLOATS = [torch.bfloat16, torch.float16, torch.float32]


def tensors(n_tokens, hidden, n_experts, device, x_dtype, dtype):
    x = torch.randn(n_tokens, hidden, device=device).to(x_dtype)
    weight = (torch.randn(n_experts, hidden, device=device) * hidden**-0.5).to(dtype)
    return x.requires_grad_(), weight.requires_grad_()


@pytest.mark.parametrize("x_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("size", [(0, 8, 2), (1, 8, 2), (33, 65, 7), (257, 520, 128)])
def test_router_linear(device, x_dtype, dtype, size):
    x, weight = tensors(*size, device, x_dtype, dtype)
    logits = moe.router_linear(x, weight)
    exact = [t.detach().double().cpu().requires_grad_() for t in (x, weight)]
    expected = reference.router_linear(*exact)
    assert logits.dtype == torch.float32
    error = (logits.double().cpu() - expected).abs().flatten()
    assert not len(error) or error.max() <= 2e-6 * expected.abs().max()
    upstream = torch.randn_like(logits)
    grads = torch.autograd.grad(logits, (x, weight), upstream)
    for grad, other in zip(
        grads, torch.autograd.grad(expected, exact, upstream.double().cpu()), strict=True
    ):
        tolerance = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 3e-5}[grad.dtype]
        assert (grad.double().cpu() - other).norm() <= tolerance * other.norm() + 1e-30


def test_weights_of_many_sizes(device):
    """Terms of a sum must neither overflow nor vanish."""
    x, _ = tensors(4, 16, 3, device, torch.bfloat16, torch.float32)
    weight = torch.logspace(-35, 35, 48, device=device).view(3, 16)
    logits = moe.router_linear(x, weight).double().cpu()
    expected = reference.router_linear(x.double().cpu(), weight.double().cpu())
    assert ((logits - expected).abs() <= 1e-5 * expected.abs()).all()


def test_gradient_in_float64():
    x, weight = tensors(5, 6, 3, "cpu", torch.float64, torch.float64)
    assert torch.autograd.gradcheck(moe.router_linear, (x, weight))


def test_under_autocast_and_compiled(device):
    x, weight = tensors(40, 64, 8, device, torch.bfloat16, torch.float32)
    plain = moe.router_linear(x, weight)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(moe.router_linear(x, weight), plain)
    compiled = torch.compile(moe.router_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x, weight), plain)
    torch.library.opcheck(torch.ops.sparsemoe.router_linear, (x, weight))


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.zeros(2, 3), torch.zeros(4, 5), r"weight \[experts, hidden\], got \[2, 3\]"),
        (torch.zeros(3), torch.zeros(4, 3), r"x must have shape \[tokens, hidden\]"),
        (torch.zeros(2, 3).int(), torch.zeros(4, 3), "x and weight must be real"),
    ],
)
def test_bad_input(x, weight, message):
    with pytest.raises(RuntimeError, match=message):
        moe.router_linear(x, weight)


def test_terms_sum_to_what_they_are_of():
    x = torch.randn(1000) * torch.logspace(-25, 25, 1000)
    three, two = _terms(x, 3), _terms(x, 2)
    assert all(term.dtype == torch.bfloat16 for term in three)
    assert torch.equal(sum(term.double() for term in three), x.double())
    assert ((sum(term.double() for term in two) - x).abs() <= x.abs() * 2**-16).all()
