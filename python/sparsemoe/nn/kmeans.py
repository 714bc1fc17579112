"""k-means, for the first codes of a quantizer."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .codebook_updates import gather, sample_rows, world_size
from .quantizer_metrics import code_usage

_ROUNDS = 5  # of candidates for the first centres; K in each


@torch.no_grad()
def kmeans(
    x: Tensor,
    num_clusters: int,
    iters: int = 10,
    *,
    metric: str = "l2",
    unit: bool = False,
    start: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm, in memory that grows with N D + K D alone.

    It starts from the vectors that greedy k-means++ (Arthur and Vassilvitskii, SODA 2007) chooses
    among candidates drawn as by k-means|| (arXiv 1203.6402), so that well separated clusters all
    get a centre. A cluster that becomes empty starts anew at a vector drawn by its error. With
    fewer different vectors than clusters, some centres are equal. The same bits for the same seed
    (torch.manual_seed).

    Args:
        x: [N, D] float32 or, on the CPU, float64; N at least 1.
        num_clusters: K.
        iters: how often the centres move.
        metric: "l2" or "cosine", as in :func:`sparsemoe.ops.rvq.encode`.
        unit: keep the centres at length 1; x must have length 1 too (spherical k-means).
        start: [K, D], centres to start from instead.

    Returns:
        The centres [K, D], and how many vectors are nearest to each, [K] int64.
    """
    centres = x[_start(x, num_clusters, metric)] if start is None else start
    for _ in range(iters):
        codes, _, errors = ops.rvq.encode(x, centres[None], metric=metric)
        sums, counts = ops.rvq.code_sums(x, codes, num_clusters)
        means = sums[0] / counts[0, :, None]
        if unit:
            means = F.normalize(means, dim=-1)
        centres = torch.where(counts[0, :, None] > 0, means, _draw(x, errors, num_clusters))
    codes = ops.rvq.encode(x, centres[None], metric=metric).codes
    return centres, code_usage(codes, num_clusters).counts[0]


def _draw(x: Tensor, errors: Tensor, num: int) -> Tensor:
    """`num` of the vectors, each with a probability that goes with its error."""
    return x[_draw_rows(errors[:, 0], num)]


def _draw_rows(weights: Tensor, num: int) -> Tensor:
    weights = weights.nan_to_num(0, 0, 0).clamp(min=1e-30)
    return torch.multinomial(weights, num, replacement=num > len(weights))


def _start(x: Tensor, num: int, metric: str) -> Tensor:
    """The rows [num] of x to start from."""
    if metric == "cosine":
        x = F.normalize(x, dim=-1)
    rows, weights = _candidates(x, num)
    return rows[_choose(x[rows], weights, num)]


def _candidates(x: Tensor, num: int) -> tuple[Tensor, Tensor]:
    """Rows of vectors that stand for all, and for how many. Vectors with NaN stand for none."""
    valid = x.isfinite().all(-1)
    if len(x) <= _ROUNDS * num:
        return torch.arange(len(x), device=x.device), valid
    rows = _draw_rows(valid.to(x.dtype), num)
    codes, _, errors = ops.rvq.encode(x, x[rows][None])
    for _ in range(_ROUNDS - 1):
        more = _draw_rows(errors[:, 0], num)
        found = ops.rvq.encode(x, x[more][None])
        nearer = found.errors < errors
        codes = torch.where(nearer, found.codes + len(rows), codes)
        errors = torch.where(nearer, found.errors, errors)
        rows = torch.cat([rows, more])
    codes = torch.where(valid[:, None], codes, -1)
    return rows, code_usage(codes, len(rows)).counts[0]


def _choose(x: Tensor, weights: Tensor, num: int) -> Tensor:
    """`num` of the vectors, one after the other: of a few drawn by their squared distance from
    those chosen before, the one that leaves the least of it. Distances in float64, as a matrix
    product would be too rough in TF32."""
    x, weights = torch.where(weights[:, None] > 0, x, 0).double(), weights.double()
    x -= weights @ x / weights.sum().clamp(min=1)  # their mean
    squares = x.square().sum(-1)
    tries = 2 + int(math.log(num))
    errors, chosen = weights, []
    for q in range(num):
        tried = torch.multinomial(errors.clamp(min=1e-30), tries, replacement=True)
        distances = squares - 2 * x[tried] @ x.T + squares[tried, None]
        left = weights * distances.clamp(min=0)
        if q:
            left = torch.minimum(left, errors)
        best = left.sum(-1).argmin()
        errors = left[best]
        chosen.append(tried[best])
    return torch.stack(chosen)


@torch.no_grad()
def gather_sample(x: Tensor, valid: Tensor | None, limit: int) -> tuple[Tensor, int]:
    """At most `limit` of the valid vectors of all ranks, the same on every rank, and their number.

    x [N, D], valid [N] bool or None. Waits for the device.
    """
    world = world_size()
    found = len(x) if valid is None else int(valid.sum())
    num = min(found, -(-limit // world))
    sample = x[sample_rows(len(x), valid, num, x.device)[0]] if num else x[:0]
    if world == 1:
        return sample, found
    sizes = gather(torch.tensor([num, found], device=x.device)).tolist()
    most = max(n for n, _ in sizes)
    if most == 0:
        return sample, 0
    every = gather(F.pad(sample, (0, 0, 0, most - num)))
    parts = [part[:n] for part, (n, _) in zip(every, sizes, strict=True)]
    return torch.cat(parts), sum(f for _, f in sizes)
