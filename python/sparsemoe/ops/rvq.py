"""Residual vector quantization: vectors as codes of several stages.

Symbols: N vectors (any leading dimensions), D width, Q stages, K codes a stage. Vectors are
float32, bfloat16 or float16, and float64 on the CPU; codebooks are float32 (float64 for float64
vectors), also under autocast, and so is all arithmetic. Codes are int32. Every function works on
the CPU and on CUDA, gives the same bits on every run, never waits for the device, and raises
RuntimeError (ValueError where Python checks) with the argument's name when one does not fit.

    codes, quantized, errors = encode(x, codebooks)  # r_0 = x; r_q = r_{q-1} - nearest code
    loss = errors.mean(0).sum() / x.shape[-1]        # commitment and codebook loss
    assert torch.equal(decode(codes, codebooks), quantized)
    ema_update(codebooks, cluster_size, embed_sum, x, codes)
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from ..types import Encoded
from . import _rvq_autograd

__all__ = ["METRICS", "beam_encode", "code_sums", "decode", "ema_update", "encode", "rotate"]

_ops = torch.ops.sparsemoe

METRICS = ("l2", "cosine")


def encode(
    x: Tensor,
    codebooks: Tensor,
    *,
    n_stages: int | None = None,
    metric: str = "l2",
    exact: bool = True,
) -> Encoded:
    """Give every vector its nearest code, and what is left of it to the next stage.

    Exact: the code of each stage is the nearest in real arithmetic to what the stages before left,
    but where two distances differ by less than float32 rounding of them. Of equally near codes
    the lowest. A distance that is not a number counts as infinite; if all are infinite, as for a
    vector with NaN, the code is 0. No distances are stored: the extra memory is one copy of the
    codebooks and a few numbers a vector; on a GPU also up to 33,792 residuals. A GPU's copy is in
    half precision, with at least 64 columns. A call there is two kernels; on Hopper the first needs
    all multiprocessors at once, and waits until kernels of other streams leave them.
    Vectors with NaN, and those to which many codes are equally near, such as dead codes that are
    all zero, have every distance computed in float32, which takes long where they are many.

    Args:
        x: [..., D].
        codebooks: [Q, K, D].
        n_stages: use the first so many; None: all.
        metric: "l2", or "cosine": the code with the largest inner product with the residual, each
            code divided by its norm for the choice. What is subtracted is the code as it is.
        exact: False leaves out the last step on a GPU: where half precision cannot separate the
            best codes, the one that seems best is taken (docs/benchmarks.md says how often that is
            another).

    Returns:
        Encoded(codes [..., Q'], quantized [..., D] of x's dtype, errors [..., Q']). The gradient of
        `quantized` goes to x unchanged (straight-through); `errors` is differentiable in x (the
        codes of earlier stages being constants) and in the codebooks: weighted, it is the
        commitment and the codebook loss (arXiv 1711.00937, eq. 3).
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {metric!r}")
    n_stages = _stages(x, codebooks, n_stages)
    return _shaped(x, _ops.rvq_encode.default(_rows(x), codebooks, n_stages, metric, exact))


def beam_encode(
    x: Tensor, codebooks: Tensor, *, beam: int = 5, n_stages: int | None = None
) -> Encoded:
    """`encode` by beam search: keep the `beam` sums of codes nearest to x after every stage.

    Errors are lower than those of `encode`, for some `beam` times its work. Babenko and Lempitsky,
    "Additive quantization", CVPR 2014.

    Args:
        x: [..., D].
        codebooks: [Q, K, D].
        beam: 1 to 32; 5 as in Faiss.
        n_stages: use the first so many; None: all.

    Returns:
        As of :func:`encode`, with the same gradients.
    """
    n_stages = _stages(x, codebooks, n_stages)
    return _shaped(x, _ops.rvq_beam_encode.default(_rows(x), codebooks, n_stages, beam))


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum the codes of every vector, first stage first.

    Args:
        codes: [..., Q'] int32, Q' at most Q; -1 adds nothing. An index out of range is refused on
            the CPU and adds nothing on a GPU.
        codebooks: [Q, K, D], float32, bfloat16, float16 or float64; sums are float32 or wider.

    Returns:
        [..., D] of the codebooks' dtype, differentiable in them: their gradient is summed in a
        fixed order.
    """
    if codes.dim() < 1 or codebooks.dim() != 3 or codes.shape[-1] > codebooks.shape[0]:
        raise ValueError(
            "codes must have shape [..., stages] with at most the stages of codebooks"
            f" [stages, codes, width], got {list(codes.shape)} and {list(codebooks.shape)}"
        )
    rows = _ops.rvq_decode.default(_rows(codes), codebooks)
    return rows.view(*codes.shape[:-1], codebooks.shape[-1])


def code_sums(
    x: Tensor,
    codes: Tensor,
    num_codes: int,
    codebooks: Tensor | None = None,
    weights: Tensor | None = None,
    *,
    after: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum the vectors, or their residuals, that chose each code. In a fixed order; no gradient.

    Args:
        x: [N, D].
        codes: [N, Q'] int32; -1 takes no part. An index out of range is refused on the CPU and
            takes no part on a GPU.
        num_codes: K.
        codebooks: [Q, K, D]: sum the residuals that each stage saw. None: sum x itself.
        weights: [N, Q'] float32 (float64 for float64), a factor for each; None: ones.
        after: sum the residuals after the stage's own code is subtracted.

    Returns:
        sums [Q', K, D] and counts [Q', K], float32 (float64 for float64).
    """
    return _ops.rvq_code_sums.default(x, codes, num_codes, codebooks, weights, after)


@torch.no_grad()
def ema_update(
    codebooks: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    codes: Tensor,
    *,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Move the codes towards the mean of the residuals that chose them, in place.

        n <- decay n + (1 - decay) count;  m <- decay m + (1 - decay) sum
        code = m / n',  n' = (n + epsilon) / (sum n + K epsilon) * sum n

    arXiv 1711.00937, appendix A.1. Where torch.distributed is initialised, counts and sums are of
    all ranks (one all-reduce). The backward pass of :func:`encode` needs the codes as they were:
    update after it, or give `encode` a copy (under torch.compile `torch.ops.sparsemoe.snapshot`,
    as nn.ResidualVQ does: a clone may be taken again after the update).

    Args:
        codebooks: [Q, K, D] contiguous; the codes as they were when `codes` were chosen.
        cluster_size: [Q, K], n, changed in place.
        embed_sum: [Q, K, D], m, changed in place.
        x: [..., D].
        codes: [..., Q'] int32 from :func:`encode`; stages past Q' stay as they are. -1 takes no
            part: give padding that code.
        decay: 0 to 1.
        epsilon: above 0.
        group: ranks to sum over; None: all.

    Returns:
        The counts [Q', K] and sums [Q', K, D] of this batch, of all ranks.
    """
    used = codes.shape[-1]
    sums, counts = code_sums(_rows(x), _rows(codes), codebooks.shape[1], codebooks)
    if dist.is_available() and dist.is_initialized():
        together = torch.cat([sums.flatten(), counts.flatten()])
        dist.all_reduce(together, group=group)
        sums = together[: sums.numel()].view_as(sums)
        counts = together[sums.numel() :].view_as(counts)
    parts = (codebooks[:used], cluster_size[:used], embed_sum[:used])
    _ops.rvq_ema_.default(*parts, sums, counts, decay, epsilon)
    return counts, sums


def rotate(x: Tensor, quantized: Tensor) -> Tensor:
    """The rotation trick: `quantized`, with the gradient to x of the rotation and scaling that take
    x to it, both held constant. arXiv 2410.06424, section 4.

    Args:
        x: [..., D].
        quantized: [..., D]; gets no gradient.

    Returns:
        quantized, of x's dtype.
    """
    return _rvq_autograd.Rotate.apply(x, quantized.detach())


def _rows(t: Tensor) -> Tensor:
    return t.flatten(0, -2) if t.dim() > 1 else t[None]


def _stages(x: Tensor, codebooks: Tensor, n_stages: int | None) -> int:
    if x.dim() < 1:
        raise ValueError(f"x must have shape [..., width], got {list(x.shape)}")
    if codebooks.dim() != 3:
        raise ValueError(
            f"codebooks must have shape [stages, codes, width], got {list(codebooks.shape)}"
        )
    return codebooks.shape[0] if n_stages is None else n_stages


def _shaped(x: Tensor, found: tuple[Tensor, Tensor, Tensor]) -> Encoded:
    codes, quantized, errors = found
    leading = x.shape[:-1]
    return Encoded(
        codes.view(*leading, codes.shape[-1]),
        quantized.view(x.shape),
        errors.view(*leading, codes.shape[-1]),
    )
