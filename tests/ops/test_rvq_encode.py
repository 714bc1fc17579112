"""encode against the nearest codes in float64, over sizes, dtypes and awkward vectors."""

import math

import pytest
import torch

from sparsemoe.ops import rvq
from tests.ops.rvq_cases import (
    DATA,
    close,
    codebooks_for,
    dtypes,
    follow,
    gaussian,
    real,
    short_in_copies,
    tiny_gaps,
    vectors,
)

SIZES = [  # vectors, width, codes, stages
    (0, 8, 7, 2),
    (1, 1, 1, 1),
    (2, 3, 2, 8),
    (63, 31, 7, 3),
    (64, 64, 128, 2),
    (65, 100, 129, 2),
    (127, 128, 300, 4),
    (129, 200, 128, 2),
    (1000, 8, 1024, 2),
    (1000, 3, 2, 3),
    (129, 1, 300, 2),
    (65, 256, 1024, 2),
    (64, 320, 300, 2),
    (63, 512, 129, 2),
    (65, 513, 300, 2),
    (33, 1024, 128, 2),
    (65, 128, 4000, 1),
    (2, 64, 8192, 2),
    (3, 2, 70000, 1),
    (5, 1100, 4, 40),
    (66, 770, 300, 5),
    (65, 66, 40, 33),
    (5, 6, 9, 130),
    (9, 130, 30000, 2),
    (300, 70, 1, 5),
]
LARGE = [  # the last ones by other kernels of a GPU: width, alignment, codes, stages
    (70000, 64, 256, 2),
    (40000, 320, 256, 2),
    (20000, 128, 1024, 4),
    (5000, 512, 1024, 8),
    (3000, 96, 8192, 2),
    (40000, 514, 300, 3),
    (20000, 1024, 1024, 2),
    (9000, 1023, 129, 2),
    (5000, 250, 1000, 3),
    (70000, 33, 100, 2),
    (3000, 64, 8200, 2),
    (2000, 12, 60000, 2),
    (1000, 600, 17000, 2),
    (20000, 20, 300, 60),
    (2500, 18, 40, 128),
    (2500, 18, 40, 129),
    (3000, 1028, 64, 2),
]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def check(x, codebooks, **options):
    """Holds the result to what float64 finds along its own codes, and returns it."""
    n_stages = options.get("n_stages") or len(codebooks)
    metric = options.get("metric", "l2")
    found = rvq.encode(x, codebooks, **options)
    codes, quantized, errors = found
    assert codes.dtype == torch.int32 and codes.shape == (len(x), n_stages)
    assert quantized.dtype == x.dtype and quantized.shape == x.shape
    assert errors.dtype == real(x.dtype) and errors.shape == codes.shape
    assert ((codes >= 0) & (codes < codebooks.shape[1])).all()
    assert torch.equal(quantized, rvq.decode(codes, codebooks).to(x.dtype))

    # of a float32 distance 8e-7 where it is 48 wide, at most 5e-6
    rounding = min(4 + x.shape[1] / 16, 40) * torch.finfo(real(x.dtype)).eps
    least_of_all = torch.finfo(real(x.dtype)).tiny ** 0.5  # shorter ones have no square
    length = x.double().norm(dim=-1)
    stages = follow(x, codebooks, codes, metric)
    for error, (code, chosen, least, first, left, before, after) in zip(
        errors.double().T, stages, strict=True
    ):
        assert torch.equal(code, first)
        if options.get("exact", True):
            scale = least if metric == "l2" else length
            assert (chosen <= least + rounding * scale + 2 * before + least_of_all).all()
        assert ((error.sqrt() - left).abs() <= rounding * left + after + least_of_all).all()
        length = left
    return found


@pytest.mark.parametrize("n, width, n_codes, n_stages", SIZES)
def test_size(device, n, width, n_codes, n_stages):
    check(*gaussian(n, width, n_codes, n_stages, device))


@needs_gpu
@pytest.mark.parametrize("options", [{}, {"exact": False}, {"metric": "cosine"}], ids=str)
@pytest.mark.parametrize("n, width, n_codes, n_stages", LARGE)
def test_many_vectors(n, width, n_codes, n_stages, options):
    check(*gaussian(n, width, n_codes, n_stages, "cuda"), **options)


@needs_gpu
@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize(
    "n, width", [(60000, 64), (40000, 320), (60000, 63), (20000, 700), (20000, 701)]
)
def test_many_vectors_that_candidates_do_not_separate(n, width, metric):
    """Of several rounds of the kernel on the tensor cores, which leaves most of them to another."""
    x, codebooks = gaussian(n, width, 128, 2, "cuda")
    codebooks[:, 1:64] = codebooks[:, :1]  # half of the codes are one
    x[::2] = codebooks[0, 0] + 0.1 * x[::2]
    check(x, codebooks, metric=metric)


@needs_gpu
@pytest.mark.parametrize("metric", rvq.METRICS)
@pytest.mark.parametrize("near", [3, 7, 16])
@pytest.mark.parametrize(
    "width, n_codes",
    [
        (64, 1024),
        (128, 1000),
        (250, 300),
        (512, 1024),
        (256, 8192),
        (516, 1024),
        (1024, 512),
        (72, 20000),
    ],
)
def test_more_near_codes_than_a_thread_keeps(width, n_codes, near, metric):
    """On Hopper, one sees codes 8 apart, and keeps two of every fourth 128."""
    x, codebooks = gaussian(2000, width, n_codes, 2, "cuda")
    groups = (
        torch.arange(near, device="cuda") * 8 + torch.tensor([[0], [130], [n_codes // 2]]).cuda()
    )
    for codebook in codebooks:
        apart = 3e-4 * torch.randn(3, near, width, device="cuda")
        codebook[groups] = codebook[groups[:, :1]] + apart
    of = torch.randint(3, (2, len(x)), device="cuda")
    sums = sum(c[groups[g, 0]] for c, g in zip(codebooks, of, strict=True))
    check(sums + 0.01 * x, codebooks, metric=metric)


@needs_gpu
@pytest.mark.parametrize(
    "n, width, n_codes, n_stages",
    [(1, 64, 100, 2), (5000, 64, 100, 2), (5000, 700, 100, 2), (300, 33, 9000, 3), (9, 1100, 4, 2)],
)
@pytest.mark.parametrize("kernels", ["", "portable"])
def test_a_call_is_two_launches(n, width, n_codes, n_stages, kernels, monkeypatch):
    x, codebooks = gaussian(n, width, n_codes, n_stages, "cuda")
    x[0, 0] = math.nan
    monkeypatch.setenv("SPARSEMOE_KERNELS", kernels)
    rvq.encode(x, codebooks)
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        rvq.encode(x, codebooks)
        torch.cuda.synchronize()
    on_gpu = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert len(on_gpu) == 2, on_gpu


@needs_gpu
@pytest.mark.parametrize("n_equal", [1, 60])
@pytest.mark.parametrize("width", [128, 512, 640, 1100])
@pytest.mark.parametrize("priorities", [(0, 0), (0, -5), (-5, 0)])
def test_on_two_streams_at_once(width, n_equal, priorities):
    """Of kernels whose blocks wait for each other."""
    given = [gaussian(n, width, 1024, 3, "cuda") for n in (20000, 300)]
    for x, codebooks in given:
        codebooks[:, :n_equal] = codebooks[:, :1]
        x[::7] = codebooks[0, 0] + 0.1 * x[::7]
    wanted = [check(*x) for x in given]
    streams = [torch.cuda.Stream(priority=p) for p in priorities]
    torch.cuda.synchronize()
    found = []
    for _ in range(20):
        for stream, (x, codebooks) in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                found.append(rvq.encode(x, codebooks))
    torch.cuda.synchronize()
    for i, result in enumerate(found):
        for a, b in zip(result, wanted[i % 2], strict=True):
            assert torch.equal(a, b)


@needs_gpu
@pytest.mark.parametrize("n", [300, 5000])
def test_many_stages_that_candidates_do_not_separate(n):
    """Left to other kernels after the 32nd stage, too."""
    x, codebooks = vectors(n, 20, "cuda"), torch.randn(40, 128, 20, device="cuda")
    codebooks[::3, 1:64] = codebooks[::3, :1]
    codebooks[:35:3] += 100
    x += 100 * 12
    check(x, codebooks)


@needs_gpu
@pytest.mark.parametrize("n_codes", [200, 300])
def test_the_same_vector_in_every_round(n_codes):
    """However many warpgroups share however many tiles of codes."""
    x, codebooks = gaussian(150, 50, n_codes, 3, "cuda")
    many, once = rvq.encode(x.repeat(120, 1), codebooks), check(x, codebooks)
    for a, b in zip(many, once, strict=True):
        assert torch.equal(a.view(120, *b.shape), b.expand(120, *b.shape))


@needs_gpu
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("width", [30, 520])
def test_many_codes_of_which_many_are_equal(width, exact):
    """The codes are searched in pieces, of which several have the nearest code."""
    x, codebooks = gaussian(700, width, 60000, 2, "cuda")
    x[7, 3] = math.nan
    codebooks[:, 50:100] = codebooks[:, :1]  # more than a thread keeps
    codebooks[:, 30000:] = codebooks[:, :30000]
    x[::5] = codebooks[0, 0] + 0.1 * x[::5]
    found = rvq.encode(x, codebooks, exact=exact)
    assert found.codes[7].tolist() == [0, 0] and (found.codes < 30000).all()
    assert torch.equal(rvq.encode(x[8:], codebooks, exact=exact).codes, found.codes[8:])
    check(x[8:], codebooks, exact=exact)


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_data(device, data):
    check(*data(257, 48, 130, 3, device))
    check(*data(65, 128, 300, 4, device))
    check(*data(130, 37, 300, 3, device))
    check(*data(65, 516, 130, 3, device))
    check(*data(65, 517, 130, 3, device))


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_data_of_every_dtype(device, data):
    """Not huge in half precision, where that would be infinite."""
    for dtype in dtypes(device):
        for width in (40, 39, 250, 516):
            x, codebooks = data(66, width, 70, 2, device)
            x = x.to(dtype)
            if x.isfinite().all():
                check(x, codebooks.to(real(dtype)))


@pytest.mark.parametrize("data", DATA, ids=lambda f: f.__name__)
def test_cosine(device, data):
    check(*data(129, 48, 130, 3, device), metric="cosine")
    check(*data(129, 50, 130, 3, device), metric="cosine")


@pytest.mark.parametrize("metric", rvq.METRICS)
@pytest.mark.parametrize("scale", [1, 1e-4])
@pytest.mark.parametrize("width, n_codes", [(48, 130), (128, 300), (516, 200)])
def test_the_first_of_equal_codes_among_nearly_equal_ones(device, width, n_codes, scale, metric):
    """A GPU's scores may tell apart what float32 distances, above all to short codes, do not."""
    x, codebooks = tiny_gaps(400, width, n_codes, 2, device)
    check(x, scale * codebooks, metric=metric)


@pytest.mark.parametrize("width, n_codes", [(48, 130), (128, 300), (516, 200)])
def test_the_first_of_equal_codes_among_short_ones(device, width, n_codes):
    """A GPU's scores tell apart what float32 distances do not."""
    check(*short_in_copies(400, width, n_codes, 2, device))


def test_cosine_of_every_dtype(device):
    for dtype in dtypes(device):
        x, codebooks = gaussian(65, 100, 129, 2, device)
        check(x.to(dtype), codebooks.to(real(dtype)), metric="cosine")


def test_cosine_divides_by_the_norm_for_the_choice_alone(device):
    codebooks = torch.tensor([[[8.0, 8.0], [0.5, 0.0], [0.0, 0.0]]], device=device)
    found = rvq.encode(torch.tensor([[3.0, 1.0]], device=device), codebooks, metric="cosine")
    assert found.codes.tolist() == [[1]] and found.quantized.tolist() == [[0.5, 0.0]]
    assert found.errors.tolist() == [[7.25]]


@pytest.mark.parametrize("metric", rvq.METRICS)
def test_fewer_stages(device, metric):
    x, codebooks = gaussian(70, 20, 33, 5, device)
    whole = rvq.encode(x, codebooks, metric=metric)
    for n_stages in (1, 3):
        part = check(x, codebooks, n_stages=n_stages, metric=metric)
        assert torch.equal(part.codes, whole.codes[:, :n_stages])
        assert torch.equal(part.errors, whole.errors[:, :n_stages])
    none = rvq.encode(x, codebooks, n_stages=0, metric=metric)
    assert none.codes.shape == none.errors.shape == (70, 0) and not none.quantized.any()


def test_leading_dimensions(device):
    x, codebooks = gaussian(24, 10, 9, 2, device)
    flat = rvq.encode(x, codebooks)
    for leading in ((4, 6), (2, 3, 4), (24, 1)):
        found = rvq.encode(x.view(*leading, 10), codebooks)
        for a, b in zip(found, flat, strict=True):
            assert a.shape[:-1] == leading and torch.equal(a.view(b.shape), b)
    for a, b in zip(rvq.encode(x[3], codebooks), flat, strict=True):
        assert torch.equal(a, b[3])


def test_strided_vectors(device):
    for dtype in dtypes(device):
        codebooks = codebooks_for(2, 33, 40, device, real(dtype))
        wide = vectors(60, 100, device, dtype)
        for x in (
            wide[:, 3:43],
            wide[::2, :40],
            wide[:40].T,
            wide[:, :80:2],
            wide[:1, :40].expand(9, 40),
            wide[:, :1].expand(60, 40),
        ):
            found, expected = rvq.encode(x, codebooks), check(x.contiguous(), codebooks)
            assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_strided_codebooks(device):
    x = vectors(50, 12, device)
    for codebooks in (
        vectors(3 * 12, 20, device).view(3, 12, 20).mT,
        codebooks_for(1, 20, 12, device).expand(3, 20, 12),
        codebooks_for(20, 3, 12, device).transpose(0, 1),
        codebooks_for(6, 20, 24, device)[::2, :, 5:17],
    ):
        found, expected = rvq.encode(x, codebooks), check(x, codebooks.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("metric", rvq.METRICS)
@pytest.mark.parametrize("width", [50, 52, 515])
def test_a_vector_does_not_depend_on_its_neighbours(device, metric, width):
    x, codebooks = gaussian(150, width, 200, 3, device)
    whole = rvq.encode(x, codebooks, metric=metric)
    for begin, end in ((0, 1), (7, 8), (149, 150), (30, 95)):
        part = rvq.encode(x[begin:end], codebooks, metric=metric)
        assert all(torch.equal(a, b[begin:end]) for a, b in zip(part, whole, strict=True))


def test_codes_do_not_depend_on_the_number_of_threads():
    x, codebooks = gaussian(700, 50, 200, 3, "cpu")
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            found.append(rvq.encode(x, codebooks))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, found[0], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [40, 41, 515])
def test_nan_and_infinity_in_a_vector_stay_there(device, bad, width):
    clean, codebooks = gaussian(130, width, 70, 3, device)
    codebooks[:, 0] += 100  # code 0 is no one's choice
    for dtype in dtypes(device):
        expected = rvq.encode(clean.to(dtype), codebooks.to(real(dtype)))
        x = clean.to(dtype, copy=True)
        x[::3, 17] = bad
        x[3] = bad
        found = rvq.encode(x, codebooks.to(real(dtype)))
        assert not expected.codes.eq(0).any() and found.codes[::3].eq(0).all()
        assert not found.errors[::3].isfinite().any()
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[1::3], b[1::3]) and torch.equal(a[2::3], b[2::3])
        decoded = rvq.decode(found.codes, codebooks.to(real(dtype)))
        assert torch.equal(found.quantized, decoded.to(dtype))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [40, 41, 515])
def test_a_code_that_is_not_finite_is_never_chosen(device, bad, width):
    x, codebooks = gaussian(130, width, 70, 3, device)
    wrong = torch.rand(3, 70, device=device) < 0.3
    wrong[:, 0] = wrong[:, -1] = True
    spoilt = codebooks.clone()
    spoilt[..., 11][wrong] = bad
    codes = check(x, spoilt).codes.long()
    assert not wrong.gather(1, codes.T).any()
    spoilt[1] = bad
    found = rvq.encode(x, spoilt)
    assert torch.equal(found.codes[:, 0].long(), codes[:, 0]) and found.codes[:, 1:].eq(0).all()


def test_without_the_last_step(device):
    for dtype in dtypes(device):
        for width in (64, 65):
            x, codebooks = gaussian(300, width, 256, 3, device)
            check(x.to(dtype), codebooks.to(real(dtype)), exact=False)


def test_errors_fall_with_the_stages(device):
    """With codes at the centres of what is left, as k-means puts them."""
    x = vectors(1000, 16, device)
    codebooks = torch.cat([x[None, :64], 0.3 * codebooks_for(3, 64, 16, device)])
    codebooks[1:, 0] = 0
    mean = rvq.encode(x, codebooks).errors.mean(0)
    assert (mean[1:] < mean[:-1]).all() and mean[-1] < 0.5 * x.square().sum(-1).mean()


@needs_gpu
@pytest.mark.parametrize("width", [64, 65])
def test_more_than_2_to_the_31_elements(width):
    n = 2**25 + 1000
    x = torch.zeros(n, width, device="cuda", dtype=torch.bfloat16)
    x[:1000].normal_(), x[-1000:].normal_()
    codebooks = codebooks_for(2, 16, width, "cuda")
    found = rvq.encode(x, codebooks)
    for part in (slice(0, 1000), slice(n - 1000, n)):
        check(x[part], codebooks)
        expected = rvq.encode(x[part].repeat(3, 1), codebooks)  # enough for the kernels for many
        assert all(torch.equal(a[part], b[:1000]) for a, b in zip(found, expected, strict=True))
    quantized = rvq.decode(found.codes, codebooks.bfloat16())
    close(quantized[-1000:], rvq.decode(found.codes[-1000:], codebooks.bfloat16()))
