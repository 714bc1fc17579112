"""Residual vector quantization as one would write it in plain PyTorch for speed: distances by a
matrix product, without the squared length of the vector, which is the same for all codes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def nearest(residual: Tensor, codebook: Tensor) -> Tensor:
    norms = codebook.square().sum(-1)
    return torch.addmm(norms, residual, codebook.T, alpha=-2).argmin(-1)


def nearest_cdist(residual: Tensor, codebook: Tensor) -> Tensor:
    return torch.cdist(residual, codebook).argmin(-1)


def nearest_bf16(residual: Tensor, codebook: Tensor) -> Tensor:
    """Products of bfloat16, summed in float32."""
    norms = codebook.square().sum(-1)
    products = torch.mm(residual.bfloat16(), codebook.bfloat16().T, out_dtype=torch.float32)
    return (norms - 2 * products).argmin(-1)


@contextmanager
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def encode(
    x: Tensor, codebooks: Tensor, nearest: Callable[[Tensor, Tensor], Tensor] = nearest
) -> tuple[Tensor, Tensor]:
    """Codes and quantized, without the errors."""
    real = residual = x.float()
    codes = []
    for codebook in codebooks:
        code = nearest(residual, codebook)
        residual = residual - codebook[code]
        codes.append(code)
    return torch.stack(codes, -1), (real - residual).to(x.dtype)


def beam_encode(x: Tensor, codebooks: Tensor, beam: int) -> tuple[Tensor, Tensor]:
    real = x.float()
    residuals = real[:, None]  # [N, B, D]
    codes = torch.zeros(len(x), 1, 0, dtype=torch.long, device=x.device)
    rows = torch.arange(len(x), device=x.device)[:, None]
    for codebook in codebooks:
        norms, n_codes = codebook.square().sum(-1), len(codebook)
        flat = residuals.flatten(0, 1)
        distances = torch.addmm(norms, flat, codebook.T, alpha=-2).unflatten(0, (len(x), -1))
        distances = distances + residuals.square().sum(-1, keepdim=True)
        best = distances.flatten(1).topk(beam, largest=False).indices
        source, code = best // n_codes, best % n_codes
        residuals = residuals[rows, source] - codebook[code]
        codes = torch.cat([codes[rows, source], code[..., None]], -1)
    return codes[:, 0], (real - residuals[:, 0]).to(x.dtype)


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    stages = torch.arange(len(codebooks), device=codes.device)
    return codebooks[stages, codes].sum(1)


def decode_loop(codes: Tensor, codebooks: Tensor) -> Tensor:
    total = codebooks[0][codes[:, 0]]
    for q in range(1, len(codebooks)):
        total += codebooks[q][codes[:, q]]
    return total


def decode_embedding_bag(codes: Tensor, codebooks: Tensor) -> Tensor:
    return F.embedding_bag(_flat(codes, codebooks.shape[1]), codebooks.flatten(0, 1), mode="sum")


def decode_backward(gradient: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    sums = torch.zeros_like(codebooks)
    for q in range(len(codebooks)):
        sums[q].index_add_(0, codes[:, q], gradient)
    return sums


def decode_backward_one_hot(gradient: Tensor, codes: Tensor, codebooks: Tensor) -> Tensor:
    n_codes = codebooks.shape[1]
    return torch.stack([_one_hot(code, n_codes).T @ gradient for code in codes.T])


def ema_update(
    codebooks: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    codes: Tensor,
    decay: float = 0.99,
    epsilon: float = 1e-5,
    one_hot: bool = False,
) -> None:
    residual = x.float()
    sums, counts = torch.zeros_like(embed_sum), torch.zeros_like(cluster_size)
    for q, code in enumerate(codes.T):
        if one_hot:
            chosen = _one_hot(code, codebooks.shape[1])
            counts[q], sums[q] = chosen.sum(0), chosen.T @ residual
        else:
            counts[q].index_add_(0, code, torch.ones_like(code, dtype=counts.dtype))
            sums[q].index_add_(0, code, residual)
        residual = residual - codebooks[q][code]
    cluster_size.lerp_(counts, 1 - decay)
    embed_sum.lerp_(sums, 1 - decay)
    total = cluster_size.sum(-1, keepdim=True)
    smoothed = (cluster_size + epsilon) / (total + cluster_size.shape[-1] * epsilon) * total
    codebooks.copy_(embed_sum / smoothed[..., None])


def step(
    codebooks: Tensor,
    cluster_size: Tensor,
    embed_sum: Tensor,
    x: Tensor,
    gradient: Tensor,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Codes, the gradient to x (straight-through, and of the commitment loss: written out),
    quantized and the loss of a training step."""
    real = residual = x.float()
    pull, loss, codes = torch.zeros_like(residual), 0, []
    for codebook in codebooks:
        code = nearest(residual, codebook)
        residual = residual - codebook[code]
        pull = pull + residual
        loss = loss + residual.square().mean()
        codes.append(code)
    together = torch.stack(codes, -1)
    x_gradient = gradient.float() + pull * (2 / x.numel())
    ema_update(codebooks, cluster_size, embed_sum, x, together, **options)
    return together, x_gradient.to(x.dtype), (real - residual).to(x.dtype), loss


def _flat(codes: Tensor, num_codes: int) -> Tensor:
    """Indices into the codes of all stages."""
    return codes + num_codes * torch.arange(codes.shape[1], device=codes.device)


def _one_hot(code: Tensor, num_codes: int) -> Tensor:
    return F.one_hot(code, num_codes).float()
