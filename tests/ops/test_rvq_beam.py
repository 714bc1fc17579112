"""beam_encode against the reference and against encode."""

import itertools
import math

import pytest
import torch

from sparsemoe.ops import rvq
from sparsemoe.reference import rvq as reference
from tests.ops.rvq_cases import (
    DATA,
    close,
    clustered,
    codebooks_for,
    dtypes,
    gaussian,
    real,
    vectors,
)

SIZES = [  # vectors, width, codes, stages, beam
    (1, 1, 1, 1, 1),
    (2, 3, 2, 8, 5),
    (63, 31, 7, 3, 32),
    (65, 100, 129, 3, 5),
    (33, 128, 300, 4, 8),
    (20, 513, 65, 2, 3),
    (9, 8, 1024, 3, 32),
    (130, 64, 3, 4, 5),
]


def check(x, codebooks, **options):
    """Codes as the reference's in float64; where two sums of codes are as good, either."""
    found = rvq.beam_encode(x, codebooks, **options)
    codes, quantized, errors = found
    assert codes.dtype == torch.int32 and quantized.dtype == x.dtype
    assert errors.dtype == real(x.dtype) and errors.shape == codes.shape
    assert torch.equal(quantized, rvq.decode(codes, codebooks).to(x.dtype))
    along = reference.given_codes(x.double(), codebooks.double(), codes)
    expected = reference.beam_encode(x.double(), codebooks.double(), **options)
    differ = (codes != expected.codes).any(-1)
    last = [t.errors[differ, -1] for t in (along, expected)]
    size = x.double().square().sum(-1)[differ]
    assert ((last[0] - last[1]).abs() <= 1e-5 * (size + last[1])).all()
    assert differ.sum() <= 0.02 * len(x)
    # rounding of the residual counts against the vector it was
    scale = x.double().square().sum(-1, keepdim=True) + along.errors
    close((errors / scale).to(errors), along.errors / scale)
    return found


@pytest.mark.parametrize("n, width, n_codes, n_stages, beam", SIZES)
def test_size(device, n, width, n_codes, n_stages, beam):
    for dtype in dtypes(device):
        x, codebooks = gaussian(n, width, n_codes, n_stages, device)
        check(x.to(dtype), codebooks.to(real(dtype)), beam=beam)


def test_no_vectors(device):
    found = rvq.beam_encode(vectors(0, 8, device), codebooks_for(2, 7, 8, device))
    assert [t.shape for t in found] == [(0, 2), (0, 8), (0, 2)]


def test_vectors_near_sums_of_codes(device):
    x, codebooks = clustered(100, 40, 50, 4, device)
    check(x, codebooks)
    check(x, codebooks, n_stages=2, beam=3)
    assert rvq.beam_encode(x, codebooks, n_stages=0).codes.shape == (100, 0)


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_a_beam_of_one_is_greedy(device, data):
    x, codebooks = data(65, 48, 70, 3, device)
    greedy, beam = rvq.encode(x, codebooks), rvq.beam_encode(x, codebooks, beam=1)
    same = (greedy.codes == beam.codes).all(-1)
    # where two codes cannot be told apart, the two may choose differently
    close(beam.errors[:, 0], greedy.errors[:, 0])
    assert torch.equal(beam.errors[same], greedy.errors[same])
    assert same.float().mean() > (0.5 if "gaps" in data.__name__ else 0.95)


def test_a_wider_beam_finds_better_codes(device):
    x, codebooks = gaussian(500, 32, 64, 4, device)
    errors = [rvq.encode(x, codebooks).errors[:, -1].mean()]
    errors += [rvq.beam_encode(x, codebooks, beam=n).errors[:, -1].mean() for n in (2, 5, 16)]
    assert all(b < a for a, b in itertools.pairwise(errors))


def test_equals_go_to_the_lower_beam_and_code(device):
    """Whole numbers: no distance is rounded, so the reference breaks the same ties."""
    codebooks = torch.randint(-1, 2, (3, 12, 4), device=device).float()
    x = torch.randint(-2, 3, (200, 4), device=device).float()
    for beam in (1, 3, 32):
        found = rvq.beam_encode(x, codebooks, beam=beam)
        expected = reference.beam_encode(x.double(), codebooks.double(), beam=beam)
        assert torch.equal(found.codes, expected.codes)
        assert torch.equal(found.errors, expected.errors.float())


def test_leading_dimensions_and_strides(device):
    x, codebooks = gaussian(24, 10, 9, 2, device)
    flat = rvq.beam_encode(x, codebooks, beam=3)
    for found in (
        rvq.beam_encode(x.view(2, 3, 4, 10), codebooks, beam=3),
        rvq.beam_encode(x.T.contiguous().T, codebooks.mT.contiguous().mT, beam=3),
        rvq.beam_encode(torch.cat([x, x], 1)[:, 10:], codebooks, beam=3),
    ):
        assert all(torch.equal(a.reshape(b.shape), b) for a, b in zip(found, flat, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity(device, bad):
    x, codebooks = gaussian(60, 20, 30, 3, device)
    expected = rvq.beam_encode(x, codebooks, beam=4)
    spoilt = x.clone()
    spoilt[::3, 7] = bad
    found = rvq.beam_encode(spoilt, codebooks, beam=4)
    assert found.codes[::3].eq(0).all() and not found.errors[::3].isfinite().any()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a[1::3], b[1::3]) and torch.equal(a[2::3], b[2::3])
    codebooks[:, ::2, 3] = bad
    found = rvq.beam_encode(x, codebooks, beam=4)
    assert (found.codes % 2 == 1).all() and found.errors.isfinite().all()
