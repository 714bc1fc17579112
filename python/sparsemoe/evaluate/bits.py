"""Bits per byte: of a model, and of compressors."""

from __future__ import annotations

import lzma
import math
import shutil
import subprocess
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from sparsemoe.data import Corpus
from sparsemoe.train.device import autocast


@dataclass(frozen=True)
class Evaluation:
    """What was measured, and how.

    bits_per_byte  mean of -log2 p(byte | bytes before it)
    bytes          how many were predicted, each once
    context        longest sequence the model saw, in bytes
    overlap        bytes of context that each prediction had at the least, the data's start apart
    """

    bits_per_byte: float
    bytes: int
    context: int
    overlap: int


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    corpus: Corpus,
    *,
    overlap: int | None = None,
    max_bytes: int | None = None,
    batch_size: int = 16,
    precision: str = "float32",
) -> Evaluation:
    """Bits per byte of a model on a corpus, every byte predicted exactly once.

    The corpus is read in windows of ``model.config.context`` bytes, each beginning
    ``context - overlap`` after the last; a window's first ``overlap`` bytes are only context.
    overlap    default: half the context
    max_bytes  about how many bytes to predict, in windows spread evenly; default: all
    precision  float32 or bfloat16 (autocast)
    """
    context = min(model.config.context, len(corpus))
    overlap = min(context // 2 if overlap is None else overlap, context - 1)
    begins, news = _windows(len(corpus), context, overlap)
    if max_bytes is not None:
        count = max(1, min(len(begins), max_bytes // (context - overlap)))
        chosen = np.linspace(0, len(begins) - 1, count).round().astype(np.int64)
        begins, news = begins[chosen], news[chosen]
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    was_training = model.training
    model.eval()
    for at in range(0, len(begins), batch_size):
        inputs, targets = corpus.windows(begins[at : at + batch_size], context)
        new = torch.from_numpy(news[at : at + batch_size, None]).to(device)
        targets = torch.from_numpy(targets).to(device)
        with autocast(device, precision):
            logits, _ = model(torch.from_numpy(inputs).to(device))
        nats = F.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
        counted = torch.arange(context, device=device) >= context - new
        total += (nats * counted).sum(dtype=torch.float64)
    model.train(was_training)
    predicted = int(news.sum())
    return Evaluation(total.item() / math.log(2) / predicted, predicted, context, overlap)


def _windows(length: int, context: int, overlap: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each window begins, and how many of its last bytes no earlier window predicted."""
    stride = context - overlap
    begins = np.arange(0, length - context + 1, stride, dtype=np.int64)
    if begins[-1] + context < length:
        begins = np.append(begins, length - context)
    ends = begins + context
    news = np.diff(ends, prepend=0)
    return begins, news


def xz_bits_per_byte(corpus: Corpus) -> float:
    """Bits per byte of ``xz -9`` on the corpus as one file."""
    packed = lzma.compress(corpus.data.tobytes(), preset=9)
    return 8 * len(packed) / len(corpus)


def zstd_bits_per_byte(corpus: Corpus) -> float | None:
    """Bits per byte of ``zstd -19`` on the corpus as one file; None where it is not installed."""
    program = shutil.which("zstd")
    if program is None:
        return None
    command = [program, "-19", "--stdout", "--quiet"]
    packed = subprocess.run(command, input=corpus.data.tobytes(), capture_output=True, check=True)
    return 8 * len(packed.stdout) / len(corpus)
