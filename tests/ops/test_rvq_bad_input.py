# ruff: noqa: E501 (a table: one case a line)
"""Every wrong input gets one sentence that names the argument, what came and what must come."""

import pytest
import torch

from sparsemoe.ops import rvq

OPS = torch.ops.sparsemoe
f, i = torch.float32, torch.int32


def x(*size, dtype=f):
    return torch.zeros(size or (4, 6), dtype=dtype)


def books(*size, dtype=f):
    """Codebooks of 3 stages with 5 codes."""
    return torch.zeros(size or (3, 5, 6), dtype=dtype)


def codes(*size, dtype=i):
    return torch.zeros(size or (4, 3), dtype=dtype)


def backward(grad=(4, 6), grad_errors=(4, 3), of=None, codebooks=None, chosen=None):
    grads = (t if torch.is_tensor(t) else torch.zeros(t) for t in (grad, grad_errors))
    given = (x() if of is None else of, books() if codebooks is None else codebooks)
    return OPS.rvq_encode_backward(*grads, *given, codes() if chosen is None else chosen)


def sums(of=None, chosen=None, num_codes=5, codebooks=None, weights=None, **options):
    given = (x() if of is None else of, codes() if chosen is None else chosen)
    return rvq.code_sums(*given, num_codes, codebooks, weights, **options)


STATE = {
    "codebooks": (3, 5, 6),
    "size": (3, 5),
    "total": (3, 5, 6),
    "sums": (3, 5, 6),
    "counts": (3, 5),
}


def ema(decay=0.9, epsilon=1e-5, **changed):
    given = (t if torch.is_tensor(t) else torch.zeros(t) for t in (STATE | changed).values())
    return OPS.rvq_ema_(*given, decay, epsilon)


ENCODINGS = {"encode": rvq.encode, "beam": rvq.beam_encode}
CASES = {
    f"{name} {case}": (lambda call=call, encode=encode: call(encode), message)
    for name, encode in ENCODINGS.items()
    for case, (call, message) in {
        "scalar": (lambda encode: encode(torch.tensor(1.0), books()), r"x must have shape \[\.\.\., width\], got \[\]"),
        "x dtype": (lambda encode: encode(x(dtype=i), books()), "x must be float32.* got Int"),
        "x empty": (lambda encode: encode(x(4, 0), books(3, 5, 0)), r"x must be at least 1 wide, got shape \[4, 0\]"),
        "rank": (lambda encode: encode(x(), books(5, 6)), r"codebooks must have shape \[stages, codes, width\], got \[5, 6\]"),
        "width": (lambda encode: encode(x(), books(3, 5, 7)), r"codebooks must have shape \[stages, codes, width\] with size 6 in dimension 2, got \[3, 5, 7\]"),
        "no codes": (lambda encode: encode(x(), books(3, 0, 6)), r"codebooks must have at least one code, got shape \[3, 0, 6\]"),
        "half codes": (lambda encode: encode(x(dtype=torch.float16), books(dtype=torch.float16)), "codebooks must have dtype Float, got Half"),
        "double codes": (lambda encode: encode(x(), books(dtype=torch.float64)), "codebooks must have dtype Float, got Double"),
        "double x": (lambda encode: encode(x(dtype=torch.float64), books()), "codebooks must have dtype Double, got Float"),
        "stages over": (lambda encode: encode(x(), books(), n_stages=4), "n_stages must be from 0 to the 3 of codebooks, got 4"),
        "stages below": (lambda encode: encode(x(), books(), n_stages=-1), "n_stages must be from 0 to the 3 of codebooks, got -1"),
    }.items()
} | {
    "metric": (lambda: rvq.encode(x(), books(), metric="l1"), "metric must be one of l2, cosine, got 'l1'"),
    "bare metric": (lambda: OPS.rvq_encode(x(), books(), 3, "l1"), "metric must be 'l2' or 'cosine', got 'l1'"),
    "bare x rank": (lambda: OPS.rvq_encode(x(6), books(), 3), r"x must have shape \[vectors, width\], got \[6\]"),
    "beam zero": (lambda: rvq.beam_encode(x(), books(), beam=0), "beam must be from 1 to 32, got 0"),
    "beam over 32": (lambda: rvq.beam_encode(x(), books(), beam=33), "beam must be from 1 to 32, got 33"),
    "backward grad": (lambda: backward(grad=(4, 5)), r"grad_quantized must have shape \[vectors, width\] with size 6 in dimension 1, got \[4, 5\]"),
    "backward grad rows": (lambda: backward(grad=(3, 6)), r"grad_quantized must have shape .* size 4 in dimension 0, got \[3, 6\]"),
    "backward grad dtype": (lambda: backward(grad=x().half()), "grad_quantized must have dtype Float, got Half"),
    "backward errors": (lambda: backward(grad_errors=(4, 2)), r"grad_errors must have shape \[vectors, stages\] with size 3 in dimension 1, got \[4, 2\]"),
    "backward errors dtype": (lambda: backward(grad_errors=codes().double()), "grad_errors must have dtype Float, got Double"),
    "backward x": (lambda: backward(of=x(6)), r"x must have shape \[vectors, width\], got \[6\]"),
    "backward codebooks": (lambda: backward(codebooks=books(3, 5, 7)), "codebooks must have shape .* size 6 in dimension 2"),
    "backward stages": (lambda: backward(codebooks=books(2, 5, 6)), "n_stages must be from 0 to the 2 of codebooks, got 3"),
    "backward codes": (lambda: backward(chosen=codes() + 5), r"codes must hold indices from 0 to 4, or -1 for none, got 5 at \[0, 0\]"),
    "backward codes rows": (lambda: backward(chosen=codes(5, 3)), r"codes must have shape \[vectors, stages\] with size 4 in dimension 0, got \[5, 3\]"),
    "decode scalar": (lambda: rvq.decode(torch.tensor(1).int(), books()), r"codes must have shape \[\.\.\., stages\] with at most the stages of codebooks \[stages, codes, width\], got \[\]"),
    "decode stages": (lambda: rvq.decode(codes(4, 4), books()), r"codes must have shape \[\.\.\., stages\] with at most .* got \[4, 4\] and \[3, 5, 6\]"),
    "decode rank": (lambda: rvq.decode(codes(), books(5, 6)), r"codes must have shape .* codebooks \[stages, codes, width\], got \[4, 3\] and \[5, 6\]"),
    "decode codes dtype": (lambda: rvq.decode(codes(dtype=torch.int64), books()), "codes must have dtype Int, got Long"),
    "decode dtype": (lambda: rvq.decode(codes(), books(dtype=i)), "codebooks must be float32.* got Int"),
    "decode index": (lambda: rvq.decode(codes() + 5, books()), r"codes must hold indices from 0 to 4, or -1 for none, got 5 at \[0, 0\]"),
    "decode index below": (lambda: rvq.decode(codes() - 2, books()), "codes must hold indices .* got -2"),
    "bare decode stages": (lambda: OPS.rvq_decode(codes(4, 4), books()), r"codes must have at most the 3 stages of codebooks, got shape \[4, 4\]"),
    "sums x": (lambda: sums(of=x(6)), r"x must have shape \[vectors, width\], got \[6\]"),
    "sums x dtype": (lambda: sums(of=x(dtype=i)), "x must be float32.* got Int"),
    "sums num_codes": (lambda: sums(num_codes=0), "num_codes must be at least 1, got 0"),
    "sums codes": (lambda: sums(chosen=codes(5, 3)), r"codes must have shape \[vectors, stages\] with size 4 in dimension 0, got \[5, 3\]"),
    "sums codes rank": (lambda: sums(chosen=codes(4)), r"codes must have shape \[vectors, stages\], got \[4\]"),
    "sums codes dtype": (lambda: sums(chosen=codes(dtype=torch.int64)), "codes must have dtype Int, got Long"),
    "sums index": (lambda: sums(chosen=codes() + 5), r"codes must hold indices from 0 to 4, .* got 5 at \[0, 0\]"),
    "sums codebooks": (lambda: sums(codebooks=books(3, 4, 6)), r"codebooks must have shape .* size 5 in dimension 1, got \[3, 4, 6\]"),
    "sums codebooks stages": (lambda: sums(codebooks=books(2, 5, 6)), "n_stages must be from 0 to the 2 of codebooks, got 3"),
    "sums codebooks dtype": (lambda: sums(codebooks=books().half()), "codebooks must have dtype Float, got Half"),
    "sums weights": (lambda: sums(weights=torch.ones(4, 2)), r"weights must have shape \[vectors, stages\] with size 3 in dimension 1, got \[4, 2\]"),
    "sums weights rank": (lambda: sums(weights=torch.ones(4)), r"weights must have shape \[vectors, stages\], got \[4\]"),
    "sums weights dtype": (lambda: sums(weights=torch.ones(4, 3).half()), "weights must have dtype Float, got Half"),
    "sums after": (lambda: sums(after=True), "codebooks must be given for after=True, got None"),
    "ema decay": (lambda: ema(decay=1.5), "decay must be from 0 to 1, got 1.5"),
    "ema decay nan": (lambda: ema(decay=float("nan")), "decay must be from 0 to 1, got nan"),
    "ema epsilon": (lambda: ema(epsilon=0.0), "epsilon must be finite and above 0, got 0"),
    "ema rank": (lambda: ema(codebooks=(5, 6)), r"codebooks must have shape \[stages, codes, width\], got \[5, 6\]"),
    "ema dtype": (lambda: ema(codebooks=books().half()), "codebooks must be float32 or .* float64, got Half"),
    "ema size": (lambda: ema(size=(3, 4)), r"cluster_size must have shape \[stages, codes\] with size 5 in dimension 1, got \[3, 4\]"),
    "ema size dtype": (lambda: ema(size=torch.zeros(3, 5).double()), "cluster_size must have dtype Float, got Double"),
    "ema total": (lambda: ema(total=(3, 5)), r"embed_sum must have shape \[stages, codes, width\], got \[3, 5\]"),
    "ema sums": (lambda: ema(sums=(2, 5, 6)), r"sums must have shape .* size 3 in dimension 0, got \[2, 5, 6\]"),
    "ema counts": (lambda: ema(counts=torch.zeros(3, 5).int()), "counts must have dtype Float, got Int"),
    "ema strides": (lambda: ema(codebooks=books(3, 6, 5).mT), "codebooks, cluster_size and embed_sum must be contiguous"),
    "update codes": (
        lambda: rvq.ema_update(books(), torch.ones(3, 5), books(), x(), codes(5, 3)),
        r"codes must have shape \[vectors, stages\] with size 4 in dimension 0, got \[5, 3\]",
    ),
    "update stages": (
        lambda: rvq.ema_update(books(), torch.ones(3, 5), books(), x(), codes(4, 4)),
        "n_stages must be from 0 to the 3 of codebooks, got 4",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, message = CASES[name]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("other", ["size", "total"])
def test_nothing_is_changed_by_a_refused_update(other):
    given = {k: torch.ones(size) for k, size in STATE.items()}
    given[other] = given[other][..., :-1]
    with pytest.raises(RuntimeError):
        ema(**given)
    assert all((t == 1).all() for t in given.values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_tensors_on_two_devices():
    for encode in ENCODINGS.values():
        with pytest.raises(RuntimeError, match="codebooks must be on the same device as x"):
            encode(x().cuda(), books())
        with pytest.raises(RuntimeError, match="x must be .* on a GPU, got float64"):
            encode(x(dtype=torch.float64).cuda(), books(dtype=torch.float64).cuda())
    with pytest.raises(RuntimeError, match="codes must be on the same device as codebooks"):
        rvq.decode(codes(), books().cuda())
    with pytest.raises(RuntimeError, match="codebooks must be .* on a GPU, got float64"):
        rvq.decode(codes().cuda(), books(dtype=torch.float64).cuda())
    cuda = {"of": x().cuda(), "chosen": codes().cuda()}
    with pytest.raises(RuntimeError, match="codes must be on the same device as x"):
        sums(of=x().cuda())
    with pytest.raises(RuntimeError, match="codebooks must be on the same device as x"):
        sums(**cuda, codebooks=books())
    with pytest.raises(RuntimeError, match="weights must be on the same device as x"):
        sums(**cuda, weights=torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="cluster_size must be on the same device as codebooks"):
        ema(codebooks=books().cuda())
    with pytest.raises(RuntimeError, match="grad_quantized must be on the same device as x"):
        backward(of=x().cuda(), codebooks=books().cuda(), chosen=codes().cuda())
