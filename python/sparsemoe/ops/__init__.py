"""Functions over torch.ops.sparsemoe, one module a family."""

from . import moe, rvq

__all__ = ["moe", "rvq"]
