"""Functions over torch.ops.sparsemoe, one module a family."""

from . import moe, rvq, sinkhorn

__all__ = ["moe", "rvq", "sinkhorn"]
