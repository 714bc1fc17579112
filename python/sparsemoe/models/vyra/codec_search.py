"""Codes that decode better than the nearest ones: analysis by synthesis.

The nearest codes to a patch's latents may decode to a wrong byte where others, nearly as near, do
not. Noise on the latents finds such codes; the decoder says which to keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from sparsemoe.models.vyra.codec import Codec


@torch.no_grad()
def search_codes(
    codec: Codec, tokens: Tensor, latents: Tensor, codes: Tensor, tries: int
) -> Tensor:
    """Codes [B, P, Q] of tokens [B, L], from the nearest ones: of each patch with wrong bytes,
    those of ``tries`` that leave the fewest, or of as few the lowest cross-entropy.

    A patch's noise depends on its place alone and its choice on patches up to it: the codes stay
    causal, and are the same each time. All patches are tried at once, and a patch's bytes depend
    on the codes before it too, some of which are then not kept: a try is judged by what it seems to
    win. Most of that remains, but single patches, and short texts, may also come out worse.
    """
    residual = latents - codec.quantizer.decode(codes)
    size = residual.square().mean(-1, keepdim=True).sqrt()
    generator = torch.Generator(latents.device).manual_seed(0)
    shape = (codec.config.patches, latents.shape[-1])
    wrong, loss = _misses(codec, tokens, codes)
    for _ in range(tries):
        noise = torch.randn(shape, generator=generator, device=latents.device, dtype=latents.dtype)
        tried = codec.quantizer.encode(latents + size * noise[: latents.shape[1]])
        whole = wrong == 0
        tried = torch.where(whole[..., None], codes, tried)
        wrong_then, loss_then = _misses(codec, tokens, tried)
        better = (wrong_then < wrong) | ((wrong_then == wrong) & (loss_then < loss))
        codes = torch.where(better[..., None], tried, codes)
        news = better | whole  # other codes before it may have broken a patch that was whole
        wrong, loss = torch.where(news, wrong_then, wrong), torch.where(news, loss_then, loss)
    return codes


def _misses(codec: Codec, tokens: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Wrong bytes and nats of each patch, [B, P]."""
    logits, ratio = codec.decode(codes).float(), codec.config.compression_ratio
    tokens = tokens.long()
    nats = F.cross_entropy(logits.transpose(1, 2), tokens, reduction="none")
    wrong = logits.argmax(-1) != tokens
    return wrong.unflatten(1, (-1, ratio)).sum(-1), nats.unflatten(1, (-1, ratio)).sum(-1)
