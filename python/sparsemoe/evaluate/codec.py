"""How well a codec reconstructs, and what its codes cost."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemoe.data import Corpus
from sparsemoe.models.vyra import Codec
from sparsemoe.nn import CodeUsage
from sparsemoe.train.device import autocast, not_compiled


@dataclass(frozen=True)
class StageEvaluation:
    """Decoding from the codes of the first ``stages`` stages.

    byte_accuracy        share of bytes whose likeliest logit is right
    exact_patches        share of patches without a wrong byte
    exact_windows        share of windows without a wrong byte
    reconstruction_bits  mean of -log2 p(byte | codes up to its patch). Not a language model's
                         score: the codes are made from the byte itself
    code_bits            entropies of these stages' codes, each by itself and over all that was
                         evaluated, in bits a byte
    total_bits           code_bits + reconstruction_bits: what coding without loss would cost, but
                         for the codec and the table of the codes' frequencies. Comparable with
                         other compressors and language models
    """

    stages: int
    byte_accuracy: float
    exact_patches: float
    exact_windows: float
    reconstruction_bits: float
    code_bits: float
    total_bits: float


@dataclass(frozen=True)
class CodecEvaluation:
    """What was measured, and on how much.

    entropy, perplexity, usage  of each stage's codes: bits a code, 2^entropy, share of the codebook
    tries                       of codes where bytes came back wrong
    context                     bytes a window: each begins where the last ended, across files
    """

    bytes: int
    patches: int
    windows: int
    context: int
    compression_ratio: int
    tries: int
    entropy: list[float]
    perplexity: list[float]
    usage: list[float]
    stages: list[StageEvaluation]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@torch.no_grad()
def evaluate_codec(
    model: Codec,
    corpus: Corpus,
    *,
    stages: Sequence[int] | None = None,
    max_bytes: int | None = None,
    batch_size: int = 16,
    precision: str = "float32",
    tries: int = 0,
) -> CodecEvaluation:
    """Encodes and decodes a corpus in windows of ``model.config.context`` bytes, each byte once.

    stages     decode from so many stages; default: from 1, 2, ... and all
    max_bytes  about how many bytes, in windows spread evenly; default: all
    precision  float32 or bfloat16 (autocast)
    tries      as of Codec.encode
    """
    config = model.config
    stages = range(1, config.num_quantization_stages + 1) if stages is None else stages
    begins = np.arange(0, len(corpus), config.context, dtype=np.int64)
    if max_bytes is not None:
        count = max(1, min(len(begins), max_bytes // config.context))
        begins = begins[np.linspace(0, len(begins) - 1, count).round().astype(np.int64)]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    sums = {n: torch.zeros(4, dtype=torch.float64, device=device) for n in stages}
    counts = torch.zeros(
        config.num_quantization_stages, config.codebook_size, dtype=torch.int64, device=device
    )
    num_bytes = num_patches = 0
    for at in range(0, len(begins), batch_size):
        padded, there = _windows(corpus, begins[at : at + batch_size], config.context)
        tokens, valid = torch.from_numpy(padded).to(device).long(), torch.from_numpy(there)
        patch_valid = valid.unflatten(1, (-1, config.compression_ratio)).any(-1)
        num_bytes, num_patches = num_bytes + int(valid.sum()), num_patches + int(patch_valid.sum())
        valid = valid.to(device)
        with autocast(device, precision), not_compiled():
            codes = model.encode(tokens, tries)
            counts += _counts(codes, patch_valid.to(device), config.codebook_size)
            for n in stages:
                logits = model.decode(codes[..., :n])
                sums[n] += _sums(logits, tokens, valid, config.compression_ratio)
    model.train(was_training)
    usage = CodeUsage(counts.cpu())
    entropy = usage.entropy_bits().tolist()
    total = (num_bytes, num_patches, len(begins))
    return CodecEvaluation(
        *total,
        config.context,
        config.compression_ratio,
        tries,
        entropy,
        usage.perplexity().tolist(),
        usage.used_share().tolist(),
        [_stage(n, sums[n].tolist(), sum(entropy[:n]), *total) for n in stages],
    )


def _windows(corpus: Corpus, begins: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [B, length], zeros past the corpus' end, and which are bytes of it."""
    ends = np.minimum(begins + length, len(corpus))
    there = np.arange(length) < (ends - begins)[:, None]
    padded = np.zeros(there.shape, dtype=np.uint8)
    for row, (begin, end) in enumerate(zip(begins, ends, strict=True)):
        padded[row, : end - begin] = corpus.data[begin:end]
    return padded, there


def _counts(codes: Tensor, valid: Tensor, codebook_size: int) -> Tensor:
    """How many valid patches chose each code [Q, K]; codes [B, P, Q], valid [B, P]."""
    chosen = codes[valid].long()
    return torch.stack([c.bincount(minlength=codebook_size) for c in chosen.unbind(-1)])


def _sums(logits: Tensor, tokens: Tensor, valid: Tensor, ratio: int) -> Tensor:
    """Nats, right bytes, and patches and windows without a wrong byte; padding is none."""
    nats = F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none")
    right = logits.argmax(-1) == tokens
    fine = right | ~valid
    patches = fine.unflatten(1, (-1, ratio))
    whole = patches.all(-1) & valid.unflatten(1, (-1, ratio)).any(-1)
    sums = ((nats * valid).sum(dtype=torch.float64), (right & valid).sum(), whole.sum())
    return torch.stack([s.double() for s in (*sums, fine.all(1).sum())])


def _stage(
    stages: int, sums: list[float], entropy: float, num_bytes: int, num_patches: int, windows: int
) -> StageEvaluation:
    nats, right, patches, whole = sums
    reconstruction = nats / math.log(2) / num_bytes
    code_bits = entropy * num_patches / num_bytes
    return StageEvaluation(
        stages,
        right / num_bytes,
        patches / num_patches,
        whole / windows,
        reconstruction,
        code_bits,
        code_bits + reconstruction,
    )
