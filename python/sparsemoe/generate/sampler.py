"""Drawing bytes one after another, with a cache of what was seen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsemoe.models.moe_lm import START, KVCache, MoELM


@dataclass(frozen=True)
class Sampling:
    """How a byte is drawn from the model's distribution. Raises ValueError.

    temperature  divides the logits; 0 takes the likeliest byte
    top_k        only the k likeliest bytes; None: all
    top_p        only the likeliest bytes that together have this probability; 1: all
    seed         of the random numbers: the same seed gives the same text
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1, or None for all")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")

    def draw(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """logits [256] -> one byte, an int64 tensor [1] on the same device."""
        if self.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        logits, order = (logits.float() / self.temperature).sort(descending=True, stable=True)
        if self.top_k is not None:
            logits[self.top_k :] = -torch.inf
        probabilities = logits.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= self.top_p, 0.0)
        return order[torch.multinomial(probabilities, 1, generator=generator)]


@torch.no_grad()
def generate(
    model: MoELM, prompt: bytes, num_bytes: int, sampling: Sampling | None = None
) -> Iterator[int]:
    """Yields ``num_bytes`` bytes (0..255) that follow a prompt at the start of a document.

    The prompt may be empty. Where prompt and text outgrow the model's context, the last half
    of the context is kept.
    """
    sampling = sampling or Sampling()
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    context = model.config.context
    seen = [START, *prompt]
    model.eval()
    cache: KVCache | None = None
    for _ in range(num_bytes):
        if cache is None or cache.length == context:
            keep = context if cache is None else max(1, context // 2)
            cache, new = KVCache(model.config, device=device), seen[-keep:]
        logits, _ = model(torch.tensor([new], device=device), cache=cache)
        byte = int(sampling.draw(logits[0, -1], generator))
        yield byte
        seen.append(byte)
        new = [byte]
