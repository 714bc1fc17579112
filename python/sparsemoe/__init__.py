"""Fused mixture-of-experts operations for PyTorch.

`sparsemoe.ops` holds the functions, `sparsemoe.nn` the modules made of them, and
`sparsemoe.reference` the same functions in plain PyTorch, written to be read.
"""

# _library comes first: it registers torch.ops.sparsemoe.
from sparsemoe import _library, nn, ops  # noqa: F401
from sparsemoe._version import __version__
from sparsemoe.info import build_info

__all__ = ["__version__", "build_info", "nn", "ops"]
