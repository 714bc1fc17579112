"""What the random inputs of every family have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench import timing

GPU = timing.DEVICE.type == "cuda"


class RandomInputs:
    """The same values on every run. Those that may want a gradient are leaves."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape
        self._generator = torch.Generator(timing.DEVICE).manual_seed(0)
        self._gradients: dict[Any, Tensor] = {}

    @property
    def matmul_dtype(self) -> torch.dtype:
        """Of the matrix product whose rate is the ceiling of operations."""
        return self.shape.dtype

    def random(self, *size: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(
            size,
            generator=self._generator,
            device=timing.DEVICE,
            dtype=dtype or self.shape.dtype,
        )
        return values.mul_(scale).requires_grad_()

    def gradient(self, y: Tensor) -> Tensor:
        """A random gradient of y, the same on every call."""
        if y.dim() == 0:
            return torch.ones_like(y)
        if y.shape not in self._gradients:
            self._gradients[y.shape] = self.random(*y.shape, dtype=y.dtype).detach()
        return self._gradients[y.shape]
