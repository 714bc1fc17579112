"""How codebooks move in training: moving averages, and new vectors for codes that nobody chooses.

Nothing here waits for the device, and all shapes follow from those of the arguments, so that a
training step can be captured in a CUDA graph. Where torch.distributed is initialised, every rank
makes the same change.

Symbols: N vectors, D width, Q' stages in use, K codes a stage.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .. import ops


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@torch.library.custom_op("sparsemoe::snapshot", mutates_args=())
def snapshot(x: Tensor) -> Tensor:
    """A copy for the backward pass of what then changes in place.

    An operator of its own, as torch.compile may move a `clone` to the backward pass, behind the
    change, and give wrong gradients (github.com/pytorch/pytorch/pull/197039).
    """
    return x.clone(memory_format=torch.contiguous_format)


@snapshot.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def gather(x: Tensor) -> Tensor:
    """[ranks, ...] x of every rank, all of one shape."""
    flat = x.new_empty(world_size() * x.numel())
    dist.all_gather_into_tensor(flat, x.flatten())
    return flat.view(-1, *x.shape)


class CodebookErrors(torch.autograd.Function):
    """The errors of `ops.rvq.encode`, with their gradient to the codebooks alone.

    So the commitment and the codebook loss can be weighed apart though the codes are sought once.
    `values` are the codebooks as they were then.
    """

    @staticmethod
    def forward(
        ctx: Any, codebooks: Tensor, values: Tensor, x: Tensor, codes: Tensor, errors: Tensor
    ) -> Tensor:
        ctx.save_for_backward(values, x, codes)
        return errors.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, x, codes = ctx.saved_tensors
        weights = (-2 * grads[0]).contiguous()
        sums, _ = ops.rvq.code_sums(x, codes, values.shape[1], values, weights, after=True)
        return sums, None, None, None, None


def sample_rows(
    num_rows: int, valid: Tensor | None, num: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """`num` of the valid rows, evenly spaced from a random start.

    Returns them, [num] int64, all different if there are so many, and the number of valid rows.
    Without a valid row the result is any row.
    """
    total = valid.sum() if valid is not None else torch.full((), num_rows, device=device)
    start = (torch.rand((), dtype=torch.float64, device=device) * total).long()
    steps = torch.arange(num, device=device) * total // num
    places = (start + steps) % total.clamp(min=1)
    if valid is None:
        return places, total
    rows = torch.searchsorted(valid.cumsum(0), places + 1)
    return rows.clamp(max=num_rows - 1), total


def replacements(
    x: Tensor, codes: Tensor, codebooks: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A vector for each code, should it need one: a random one of those that its stage saw.

    x [N, D], codes [N, Q'], codebooks [Q', K, D], valid [N] or None. Returns the vectors
    [Q', K, D] and, [K], whether there is one.
    """
    n_stages, num_codes, width = codebooks.shape
    world = world_size()
    num = -(-num_codes // world)  # of this rank
    seen = x.new_zeros(n_stages, num, width, dtype=codebooks.dtype)
    total = x.new_zeros((), dtype=torch.int64)
    if len(x):
        rows, total = sample_rows(len(x), valid, num, x.device)
        residual = x[rows].to(codebooks.dtype)
        chosen = codes[rows].long().clamp(min=0)
        for q in range(n_stages):
            # Shifted, so that no vector replaces the same code of all stages: with the first in
            # place, nothing would be left of it for the others.
            seen[q] = residual.roll(q * num // n_stages, 0)
            residual = residual - codebooks[q][chosen[:, q]]
    there = (total > 0).expand(num)
    if world == 1:
        return seen, there
    mine = torch.cat([seen.transpose(0, 1).flatten(1), there[:, None].to(seen.dtype)], 1)
    # by turns, so that the first K are of all ranks
    every = gather(mine).transpose(0, 1).flatten(0, 1)[:num_codes]
    return every[:, :-1].unflatten(1, (n_stages, width)).transpose(0, 1), every[:, -1] > 0


def revive_(
    codebooks: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor | None,
    vectors: Tensor,
    there: Tensor,
    threshold: float,
) -> None:
    """Replace the codes whose cluster_size is below the threshold, in place.

    cluster_size and embed_sum are reset with them, or the next moving average would bring the old
    code back: to the mean size of the stage, so that a new code has time to be chosen.
    """
    dead = (cluster_size < threshold) & there
    size = cluster_size.mean(-1, keepdim=True).clamp(min=threshold).expand_as(cluster_size)
    codebooks.copy_(torch.where(dead[..., None], vectors, codebooks))
    cluster_size.copy_(torch.where(dead, size, cluster_size))
    if embed_sum is not None:
        embed_sum.copy_(torch.where(dead[..., None], vectors * size[..., None], embed_sum))


def ema_update_(
    codebooks: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    sums: Tensor,
    counts: Tensor,
    *,
    decay: float,
    epsilon: float,
    unit: bool,
) -> None:
    """The moving averages of `ops.rvq.ema_update` with sums and counts of this rank that were made
    otherwise; with `unit` the codes get length 1. In place."""
    if world_size() > 1:
        together = torch.cat([sums.flatten(), counts.flatten()])
        dist.all_reduce(together)
        sums = together[: sums.numel()].view_as(sums)
        counts = together[sums.numel() :].view_as(counts)
    cluster_size.lerp_(counts, 1 - decay)
    embed_sum.lerp_(sums, 1 - decay)
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + epsilon) / (total + cluster_size.shape[-1] * epsilon) * total
    codes = embed_sum / smoothed[..., None]
    codebooks.copy_(F.normalize(codes, dim=-1) if unit else codes)
