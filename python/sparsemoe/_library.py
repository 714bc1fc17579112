"""Finds and loads the compiled library, which registers torch.ops.sparsemoe."""

from __future__ import annotations

import ctypes
import json
import re
from pathlib import Path
from typing import Any

import torch

_MIN_TORCH = (2, 11)


def _library_path() -> Path:
    found = sorted(Path(__file__).parent.glob("_C*.so"))
    if not found:
        raise ImportError(
            "sparsemoe's compiled library is missing: install the package (pip install .) rather "
            "than importing it from its source folder."
        )
    return found[0]


def _check_torch(version: str) -> None:
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < _MIN_TORCH:
        needed = ".".join(map(str, _MIN_TORCH))
        raise ImportError(
            f"sparsemoe needs torch {needed} or later and this is torch {version}: "
            f'upgrade it (pip install --upgrade "torch>={needed}").'
        )


def _load() -> ctypes.CDLL:
    _check_torch(torch.__version__)
    path = _library_path()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(f"sparsemoe's compiled library {path} does not load: {error}") from error
    return ctypes.CDLL(str(path))  # the same handle, for the functions outside torch.ops


_library = _load()


def library_build_info() -> dict[str, Any]:
    """What the library says of itself: version, compiler, cuda_archs, cpu_isas, cpu_isa_in_use."""
    function = _library.sparsemoe_build_info
    function.restype = ctypes.c_char_p
    return json.loads(function().decode())
