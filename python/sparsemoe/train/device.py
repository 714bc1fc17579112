"""Which device to use, and in which precision it is fast."""

from __future__ import annotations

import torch

from sparsemoe.train.config import ConfigError


def choose_device(name: str = "auto") -> torch.device:
    """A GPU where there is one, for ``auto``; else the named device.

    Raises ConfigError where torch does not know it or cannot reach it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from None
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """``float32`` or ``bfloat16``; ``auto`` is bfloat16 on a GPU that has it.

    On a CPU auto is float32 also where there are matrix units for bfloat16: the number of rows
    of an expert changes with every step, and its library compiles a kernel for each new number.
    """
    if name != "auto":
        return name
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return "bfloat16" if fast else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which the model runs."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def not_compiled() -> torch.compiler.set_stance:
    """The context in which compiled modules run as they are written: for work of other shapes or
    without gradients, which would be compiled a second time."""
    return torch.compiler.set_stance("force_eager")
