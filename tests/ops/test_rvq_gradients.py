"""Gradients of encode, beam_encode, decode and rotate against autograd through the reference."""

import pytest
import torch
from torch.autograd import gradcheck

from sparsemoe.ops import rvq
from sparsemoe.reference import rvq as reference
from tests.ops.rvq_cases import close, codebooks_for, dtypes, gaussian, real, vectors

SIZES = [(0, 8, 7, 2), (1, 1, 1, 1), (65, 31, 7, 3), (130, 128, 40, 4), (40, 513, 20, 8)]
WAYS = [rvq.encode, rvq.beam_encode]


def check_encode(way, x, codebooks, **options):
    """Of the codes that were found, so that a near tie is no difference."""
    x, codebooks = (t.detach().clone().requires_grad_() for t in (x, codebooks))
    wide, same = (
        t.detach().to(t.dtype if t is codebooks else real(x.dtype)) for t in (x, codebooks)
    )
    wide, same = wide.clone().requires_grad_(), same.clone().requires_grad_()
    found = way(x, codebooks, **options)
    expected = reference.given_codes(wide, same, found.codes)
    close(found.quantized, expected.quantized, x.dtype)
    close(found.errors, expected.errors)
    weights = [torch.randn_like(t) for t in found[1:]]
    sum((a * w).sum() for a, w in zip(found[1:], weights, strict=True)).backward()
    weights[0] = weights[0].to(wide.dtype)
    sum((a * w).sum() for a, w in zip(expected[1:], weights, strict=True)).backward()
    assert x.grad.dtype == x.dtype and codebooks.grad.dtype == codebooks.dtype
    close(x.grad, wide.grad)
    close(codebooks.grad, same.grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("n, width, n_codes, n_stages", SIZES)
def test_encode(device, way, n, width, n_codes, n_stages):
    for dtype in dtypes(device):
        x, codebooks = gaussian(n, width, n_codes, n_stages, device)
        check_encode(way, x.to(dtype), codebooks.to(real(dtype)))


@pytest.mark.parametrize("way", WAYS)
def test_encode_with_fewer_stages_and_strides(device, way):
    wide = vectors(60, 100, device)
    for x in (wide[:, 3:43], wide[:40].T, wide[:1, :40].expand(9, 40)):
        check_encode(way, x, codebooks_for(4, 20, 40, device), n_stages=2)
    check_encode(way, wide[:, :24], codebooks_for(5, 24, 16, device).mT)


@pytest.mark.parametrize("way", WAYS)
def test_each_gradient_alone(device, way):
    x, codebooks = (t.requires_grad_() for t in gaussian(33, 20, 9, 3, device))
    found = way(x, codebooks)
    straight = torch.autograd.grad(found.quantized.sum(), (x, codebooks), retain_graph=True)
    assert (straight[0] == 1).all() and not straight[1].any()
    last = torch.autograd.grad(found.errors[:, 2].sum(), (x, codebooks))
    close(last[0], 2 * (x - found.quantized).detach())
    assert not last[1][:2].any() and last[1][2].any()


@pytest.mark.parametrize("way", WAYS)
def test_leading_dimensions(device, way):
    x, codebooks = gaussian(24, 10, 9, 2, device)
    grads = []
    for shape in ((24, 10), (2, 3, 4, 10)):
        leaf = x.clone().requires_grad_()
        found = way(leaf.view(shape), codebooks)
        (found.errors.sum() + (found.quantized.view(24, 10) * x).sum()).backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("way", WAYS)
def test_encode_in_float64(way):
    x, codebooks = gaussian(9, 5, 6, 3, "cpu")
    x, codebooks = x.double().requires_grad_(), codebooks.double().requires_grad_()
    constant = codebooks.detach()
    assert gradcheck(lambda x: way(x, constant).errors, x)
    # codes of earlier stages count as constants: only the first stage has its whole gradient
    assert gradcheck(lambda c: way(x.detach(), c, n_stages=1).errors, codebooks)


@pytest.mark.parametrize("n, width, n_codes, n_stages", SIZES)
def test_decode(device, n, width, n_codes, n_stages):
    for dtype in dtypes(device):
        codebooks = codebooks_for(n_stages, n_codes, width, device, dtype).requires_grad_()
        wide = codebooks.detach().to(real(dtype)).requires_grad_()
        codes = torch.randint(-1, n_codes, (n, n_stages), device=device).int()
        grad = vectors(n, width, device, dtype)
        rvq.decode(codes, codebooks).backward(grad)
        reference.decode(codes, wide).backward(grad.to(wide.dtype))
        assert codebooks.grad.dtype == dtype
        close(codebooks.grad, wide.grad)


def test_decode_of_fewer_stages(device):
    codebooks = codebooks_for(4, 9, 12, device).requires_grad_()
    codes = torch.randint(-1, 9, (5, 6, 2), device=device).int()
    rvq.decode(codes, codebooks).square().sum().backward()
    assert codebooks.grad[:2].any() and not codebooks.grad[2:].any()


def test_decode_in_float64():
    codebooks = codebooks_for(3, 6, 5, "cpu", torch.float64).requires_grad_()
    codes = torch.randint(-1, 6, (9, 3)).int()
    assert gradcheck(lambda c: rvq.decode(codes, c), codebooks)


def test_rotate(device):
    for dtype in dtypes(device):
        x = vectors(33, 20, device, dtype).view(3, 11, 20).requires_grad_()
        wide = x.detach().to(real(dtype)).requires_grad_()
        quantized = vectors(33, 20, device, dtype).view(3, 11, 20)
        found = rvq.rotate(x, quantized)
        expected = reference.rotate(wide, quantized.to(wide.dtype))
        assert found.dtype == dtype and torch.equal(found, quantized)
        close(found, expected, dtype)
        grad = torch.randn_like(quantized)
        found.backward(grad)
        expected.backward(grad.to(wide.dtype))
        close(x.grad, wide.grad)


def test_rotate_keeps_lengths_and_angles(device):
    """The gradient is rotated and scaled, as x is to become quantized."""
    x = vectors(20, 7, device).requires_grad_()
    quantized = vectors(20, 7, device)
    ratio = quantized.norm(dim=-1) / x.detach().norm(dim=-1)
    rvq.rotate(x, quantized).backward(quantized)
    close(x.grad, ratio.square()[:, None] * x.detach())


def test_rotate_of_a_zero_vector_is_finite(device):
    x = torch.zeros(3, 7, device=device, requires_grad=True)
    rvq.rotate(x, torch.zeros_like(x)).sum().backward()
    assert x.grad.isfinite().all()
