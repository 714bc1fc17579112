"""Every op in plain PyTorch, written to be read: the specification that the kernels are held to."""

from . import moe, rvq, sinkhorn

__all__ = ["moe", "rvq", "sinkhorn"]
