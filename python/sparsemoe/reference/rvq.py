"""Residual vector quantization, in plain PyTorch.

Symbols: N vectors, D width, Q stages, K codes a stage, B beams. Every function here is
differentiable by autograd alone and exact in float64.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import Encoded


def _real(x: Tensor) -> Tensor:
    """Half-width types are computed in float32."""
    return x if x.dtype == torch.float64 else x.float()


def nearest(x: Tensor, codebook: Tensor, metric: str = "l2") -> Tensor:
    """The nearest code of each vector: x [N, D], codebook [K, D] -> [N].

    The lowest index of equals. A distance that is NaN counts as infinite.
    """
    if metric == "l2":
        distances = torch.cdist(x, codebook, compute_mode="donot_use_mm_for_euclid_dist")
    else:
        distances = -x @ F.normalize(codebook, dim=-1).T
    return torch.where(distances.isnan(), torch.inf, distances).argmin(-1)


class _StraightThrough(torch.autograd.Function):
    """The value of one tensor, the gradient of another (arXiv 1308.3432)."""

    @staticmethod
    def forward(ctx, value, x):
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return None, grad


def encode(
    x: Tensor, codebooks: Tensor, n_stages: int | None = None, metric: str = "l2"
) -> Encoded:
    """r_0 = x; stage q chooses the code i_q nearest to r_{q-1}; r_q = r_{q-1} - e_q[i_q].

    The gradient of `quantized` goes straight through to x. `errors` is |r_{q-1} - e_q[i_q]|^2 with
    a gradient to r_{q-1} (hence x, the codes of earlier stages being constants) and to e_q: the
    commitment and the codebook loss of VQ-VAE (arXiv 1711.00937, eq. 3) for each vector and stage.
    """
    residual = _real(x.detach()).flatten(0, -2)
    codes = []
    with torch.no_grad():
        for codebook in codebooks[:n_stages]:
            code = nearest(residual, codebook, metric)
            residual = residual - codebook[code]
            codes.append(code.int())
    return given_codes(x, codebooks, torch.stack(codes, -1).view(*x.shape[:-1], len(codes)))


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """The sum over stages of the codes [..., Q'] of codebooks [Q, K, D]; -1 adds nothing."""
    total = codebooks.new_zeros(*codes.shape[:-1], codebooks.shape[-1])
    for code, codebook in zip(codes.long().unbind(-1), codebooks, strict=False):
        total = total + torch.where((code >= 0)[..., None], codebook[code.clamp(min=0)], 0)
    return total


def code_sums(
    x: Tensor,
    codes: Tensor,
    num_codes: int,
    codebooks: Tensor | None = None,
    weights: Tensor | None = None,
    after: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sums and counts of the vectors that chose each code, in the order of the vectors.

    sums[q, j] = sum of weights[n, q] * v_q[n] over the n whose code at stage q is j, where v_q is x
    itself without codebooks, else the residual before stage q, or after it. A code -1 takes no
    part, and its later stages see the residual as it was. Returns sums [Q', K, D], counts [Q', K].
    """
    residual = _real(x)
    sums = residual.new_zeros(codes.shape[1], num_codes, x.shape[1])
    counts = residual.new_zeros(codes.shape[1], num_codes)
    for q, code in enumerate(codes.long().unbind(-1)):
        used = code >= 0
        index = code.clamp(min=0)
        chosen = torch.zeros_like(residual)
        if codebooks is not None:
            chosen = torch.where(used[:, None], codebooks[q][index], 0)
        value = residual - chosen if after else residual
        if weights is not None:
            value = value * weights[:, q, None]
        sums[q].index_add_(0, index, torch.where(used[:, None], value, 0))
        counts[q].index_add_(0, index, used.to(counts))
        residual = residual - chosen
    return sums, counts


def ema_update(
    codebooks: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    codes: Tensor,
    decay: float = 0.99,
    epsilon: float = 1e-5,
) -> None:
    """Moves the codes towards the mean of the residuals that chose them, in place.

    n <- decay n + (1 - decay) count; m <- decay m + (1 - decay) sum; e = m / n' with Laplace
    smoothing n' = (n + eps) / (sum n + K eps) * sum n. arXiv 1711.00937, appendix A.1.
    """
    sums, counts = code_sums(x, codes, codebooks.shape[1], codebooks)
    for q in range(codes.shape[1]):
        n = cluster_size[q].mul_(decay).add_((1 - decay) * counts[q])
        m = embed_sum[q].mul_(decay).add_((1 - decay) * sums[q])
        total = n.sum()
        smoothed = (n + epsilon) / (total + len(n) * epsilon) * total
        codebooks[q] = m / smoothed[:, None]


def beam_encode(
    x: Tensor, codebooks: Tensor, beam: int = 5, n_stages: int | None = None
) -> Encoded:
    """Keeps the `beam` sums of codes nearest to x after every stage, and gives the nearest of all.

    Babenko and Lempitsky, "Additive quantization", CVPR 2014. Of equals the one from the lower
    beam, then of the lower code. Gradients as of `encode`.
    """
    stages = codebooks[:n_stages]
    with torch.no_grad():
        vectors = _real(x).flatten(0, -2)
        residuals = vectors[:, None]  # [N, B, D]
        codes = torch.zeros(len(vectors), 1, 0, dtype=torch.long, device=x.device)
        for codebook in stages:
            n_beams, n_codes = residuals.shape[1], len(codebook)
            distances = torch.cdist(
                residuals.flatten(0, 1), codebook, compute_mode="donot_use_mm_for_euclid_dist"
            )
            distances = torch.where(distances.isnan(), torch.inf, distances)
            order = distances.view(len(vectors), -1).sort(dim=-1, stable=True).indices
            best = order[:, : min(beam, n_beams * n_codes)]
            source, code = best // n_codes, best % n_codes
            residuals = residuals.gather(1, source[..., None].expand(-1, -1, x.shape[-1]))
            residuals = residuals - codebook[code]
            codes = codes.gather(1, source[..., None].expand(-1, -1, codes.shape[-1]))
            codes = torch.cat([codes, code[..., None]], -1)
        codes = codes[:, 0].int().view(*x.shape[:-1], len(stages))
    return given_codes(x, codebooks, codes)


def given_codes(x: Tensor, codebooks: Tensor, codes: Tensor) -> Encoded:
    """What `encode` returns, with gradients, for codes that were chosen otherwise."""
    residual = _real(x)
    quantized = torch.zeros_like(residual).detach()
    errors = []
    for code, codebook in zip(codes.long().unbind(-1), codebooks, strict=False):
        chosen = codebook[code]
        errors.append((residual - chosen).square().sum(-1))
        quantized = quantized + chosen.detach()
        residual = residual - chosen.detach()
    return Encoded(codes, _StraightThrough.apply(quantized, x), torch.stack(errors, -1))


def rotate(x: Tensor, quantized: Tensor) -> Tensor:
    """`quantized`, with the gradient to x of the rotation and scaling that takes x to it.

    u = x / |x|, v = quantized / |quantized|, w = (u + v) / |u + v|, all constants;
    out = |quantized| / |x| (x - 2 (x.w) w + 2 (x.u) v). arXiv 2410.06424, section 4.
    """
    q = quantized.detach()
    u, v = F.normalize(x.detach(), dim=-1), F.normalize(q, dim=-1)
    w = F.normalize(u + v, dim=-1)
    scale = q.norm(dim=-1, keepdim=True) / x.detach().norm(dim=-1, keepdim=True).clamp(min=1e-12)
    along_w, along_u = (x * w).sum(-1, keepdim=True), (x * u).sum(-1, keepdim=True)
    return scale * (x - 2 * along_w * w + 2 * along_u * v)
