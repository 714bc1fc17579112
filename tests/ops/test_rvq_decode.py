"""decode and code_sums against the reference."""

import pytest
import torch

from sparsemoe.ops import rvq
from sparsemoe.reference import rvq as reference
from tests.ops.rvq_cases import close, codebooks_for, dtypes, real, vectors

SIZES = [  # vectors, width, codes, stages
    (0, 8, 7, 2),
    (1, 1, 1, 1),
    (2, 3, 2, 8),
    (63, 31, 7, 3),
    (65, 100, 129, 2),
    (129, 200, 128, 2),
    (1000, 8, 1024, 4),
    (64, 320, 300, 2),
    (65, 513, 30, 2),
    (33, 1024, 128, 2),
]


def some_codes(n, n_codes, n_stages, device):
    return torch.randint(-1, n_codes, (n, n_stages), device=device).int()


@pytest.mark.parametrize("n, width, n_codes, n_stages", SIZES)
def test_decode(device, n, width, n_codes, n_stages):
    """Bit by bit: the sums are in the order of the stages, in float32, and rounded once."""
    for dtype in dtypes(device):
        codebooks = codebooks_for(n_stages, n_codes, width, device, dtype)
        codes = some_codes(n, n_codes, n_stages, device)
        found = rvq.decode(codes, codebooks)
        expected = reference.decode(codes, codebooks.to(real(dtype)))
        assert found.dtype == dtype and torch.equal(found, expected.to(dtype))


@pytest.mark.parametrize(
    "n, width, n_codes, n_stages",
    [(30000, 64, 50, 3), (9001, 256, 30, 4), (20000, 512, 400, 6), (16000, 512, 300, 8)],
)
def test_decode_of_many_vectors(device, n, width, n_codes, n_stages):
    """Enough of them to keep codes in shared memory: all, or those that find room."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        codebooks = codebooks_for(n_stages, n_codes, width, device, dtype)
        codes = some_codes(n, n_codes, n_stages, device)
        expected = reference.decode(codes, codebooks.float())
        assert torch.equal(rvq.decode(codes, codebooks), expected.to(dtype))
        assert torch.equal(rvq.decode(codes[1:], codebooks), expected[1:].to(dtype))


def test_decode_shapes_and_strides(device):
    codebooks = codebooks_for(6, 20, 24, device)
    codes = some_codes(24, 20, 3, device)
    flat = reference.decode(codes, codebooks)
    assert torch.equal(rvq.decode(codes.view(2, 3, 4, 3), codebooks).view(24, 24), flat)
    assert torch.equal(rvq.decode(codes[5], codebooks), flat[5])
    assert torch.equal(rvq.decode(codes.T.contiguous().T, codebooks), flat)
    for strided in (
        codebooks[::2, :, 5:17],
        codebooks[:, :, :20].mT,
        codebooks[:1].expand(3, -1, -1),
    ):
        some = codes.clamp(max=strided.shape[1] - 1)
        assert torch.equal(rvq.decode(some, strided), reference.decode(some, strided))


def test_decode_of_no_codes_is_zero(device):
    codebooks = codebooks_for(3, 20, 24, device)
    assert not rvq.decode(torch.full((5, 3), -1, device=device).int(), codebooks).any()
    nothing = rvq.decode(torch.zeros(5, 0, device=device).int(), codebooks)
    assert nothing.shape == (5, 24) and not nothing.any()


def check_sums(x, codes, n_codes, codebooks=None, weights=None, after=False):
    sums, counts = rvq.code_sums(x, codes, n_codes, codebooks, weights, after=after)
    wide = [None if t is None else t.double() for t in (codebooks, weights)]
    expected, expected_counts = reference.code_sums(x.double(), codes, n_codes, *wide, after)
    assert sums.dtype == counts.dtype == real(x.dtype)
    assert torch.equal(counts.double(), expected_counts)
    # against the size of what was summed, which may cancel
    sizes, _ = reference.code_sums(x.abs().double(), codes, n_codes, None, wide[1])
    scale = sizes.abs().amax() + expected.abs().amax() + 1 if len(x) else 1
    close(sums / scale, expected / scale, real(x.dtype))
    return sums, counts


@pytest.mark.parametrize("n, width, n_codes, n_stages", SIZES)
def test_code_sums(device, n, width, n_codes, n_stages):
    for dtype in dtypes(device):
        x = vectors(n, width, device, dtype)
        codes = some_codes(n, n_codes, n_stages, device)
        codebooks = codebooks_for(n_stages, n_codes, width, device, real(dtype))
        weights = torch.randn(n, n_stages, device=device, dtype=real(dtype))
        for options in (
            {},
            {"weights": weights},
            {"codebooks": codebooks},
            {"codebooks": codebooks, "after": True},
            {"codebooks": codebooks, "weights": weights, "after": True},
        ):
            check_sums(x, codes, n_codes, **options)


@pytest.mark.parametrize("n", [1000, 5000])
def test_code_sums_when_one_code_takes_all(device, n):
    x = vectors(n, 70, device)
    codebooks = codebooks_for(3, 9, 70, device)
    codes = torch.full((n, 3), 4, device=device).int()
    _, counts = check_sums(x, codes, 9, codebooks)
    assert counts[:, 4].eq(n).all()
    codes[::7] = 2
    codes[::11, 1] = -1
    check_sums(x, codes, 9, codebooks, after=True)


def test_code_sums_of_no_codes_are_zero(device):
    x = vectors(50, 20, device)
    sums, counts = rvq.code_sums(x, torch.full((50, 2), -1, device=device).int(), 9)
    assert not sums.any() and not counts.any()
    sums, counts = rvq.code_sums(x, torch.zeros(50, 0, device=device).int(), 9)
    assert sums.shape == (0, 9, 20) and counts.shape == (0, 9)


def test_code_sums_strides(device):
    wide = vectors(60, 100, device)
    codebooks = codebooks_for(6, 40, 24, device)[::2].mT
    weights = torch.randn(3, 60, device=device).T
    for x in (wide[:, 3:43], wide[::2, :40], wide[:40, :60].T, wide[:1, :40].expand(9, 40)):
        codes = some_codes(len(x), 24, 6, device)[:, ::2]
        check_sums(x, codes, 24, codebooks, weights[: len(x)], after=True)


def test_one_vectors_nan_reaches_its_own_code_alone(device):
    x = vectors(100, 20, device)
    codes = torch.arange(100, device=device).remainder(10)[:, None].int()
    x[3] = torch.nan
    sums, counts = rvq.code_sums(x, codes, 10)
    assert sums[0, 3].isnan().all() and sums.isnan().sum() == 20 and counts.eq(10).all()


def test_sums_do_not_depend_on_the_number_of_threads():
    x, codes = vectors(5000, 200, "cpu"), some_codes(5000, 50, 3, "cpu")
    codebooks = codebooks_for(3, 50, 200, "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(rvq.code_sums(x, codes, 50, codebooks, after=True)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("skew", [False, True])
def test_code_sums_of_many_vectors(skew):
    n, n_codes = 200_000, 1024
    x, codebooks = vectors(n, 128, "cuda"), codebooks_for(4, n_codes, 128, "cuda")
    codes = torch.randint(n_codes, (n, 4), device="cuda").int()
    if skew:
        codes[torch.rand(n, 4, device="cuda") < 0.9] = 77
    check_sums(x, codes, n_codes, codebooks)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_index_out_of_range_is_left_out_on_a_gpu():
    codebooks = codebooks_for(2, 9, 12, "cuda")
    wrong = torch.tensor([[0, 9], [-5, 3], [2**31 - 1, -(2**31)]], device="cuda").int()
    right = torch.tensor([[0, -1], [-1, 3], [-1, -1]], device="cuda").int()
    x = vectors(3, 12, "cuda")
    assert torch.equal(rvq.decode(wrong, codebooks), rvq.decode(right, codebooks))
    for options in ({}, {"codebooks": codebooks}, {"codebooks": codebooks, "after": True}):
        found, expected = (rvq.code_sums(x, codes, 9, **options) for codes in (wrong, right))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
