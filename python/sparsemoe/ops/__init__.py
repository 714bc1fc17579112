"""Functions over torch.ops.sparsemoe, one module a family."""

from . import moe

__all__ = ["moe"]
