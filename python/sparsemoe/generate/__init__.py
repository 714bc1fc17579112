"""Text from a model."""

from sparsemoe.generate.sampler import Sampling, generate

__all__ = ["Sampling", "generate"]
