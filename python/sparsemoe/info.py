"""What is installed, what was compiled in, and what this machine will use."""

from __future__ import annotations

import re
from typing import Any

import torch

from sparsemoe._library import library_build_info


def build_info() -> dict[str, Any]:
    """Returns a dict of plain values, ready for JSON.

    version          of sparsemoe
    torch            its version
    compiler         what built the library
    cuda_archs       GPU code compiled in: 'sm_90a' machine code, 'compute_80' PTX; [] without CUDA
    cpu_isas         instruction sets that the CPU kernels were compiled for
    cpu_isa_in_use   the one that this processor runs
    threads          threads that the CPU kernels use (torch.get_num_threads())
    cuda_driver      newest CUDA version that the driver supports, or None without a driver
    torch_cuda       the CUDA version that torch was built with, or None
    gpus             names of the GPUs that torch sees
    will_use         one entry for each kind of tensor: ['cuda sm_90a', 'cpu avx512']
    expert_products  what multiplies the experts on each GPU: 'hopper' kernels or 'portable' ones
    """
    library = library_build_info()
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    codes = [gpu_code(torch.cuda.get_device_capability(i), library["cuda_archs"]) for i in gpus]
    return {
        "version": library["version"],
        "torch": torch.__version__,
        "compiler": library["compiler"],
        "cuda_archs": library["cuda_archs"],
        "cpu_isas": library["cpu_isas"],
        "cpu_isa_in_use": library["cpu_isa_in_use"],
        "threads": torch.get_num_threads(),
        "cuda_driver": _cuda_driver_version(),
        "torch_cuda": torch.version.cuda,
        "gpus": [torch.cuda.get_device_name(i) for i in gpus],
        "will_use": [
            *dict.fromkeys(f"cuda {code}" for code in codes if code),
            f"cpu {library['cpu_isa_in_use']}",
        ],
        "expert_products": ["hopper" if code == "sm_90a" else "portable" for code in codes if code],
    }


def gpu_code(capability: tuple[int, int], compiled: list[str]) -> str | None:
    """Which of the compiled codes a GPU of this compute capability runs, or None.

    Machine code runs within its major version (sm_90a on 9.0 alone), PTX on any later GPU.
    """
    best: tuple[int, int, str] | None = None
    for code in compiled:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", code)
        if match is None:
            continue
        target = (int(match[2]), int(match[3]))
        if match[4] == "a":
            fits = target == capability
        elif match[1] == "sm" or match[4] == "f":
            fits = target[0] == capability[0] and target <= capability
        else:
            fits = target <= capability
        candidate = (10 * target[0] + target[1], (match[1] == "sm") + (match[4] != ""), code)
        if fits and (best is None or candidate > best):
            best = candidate
    return best[2] if best else None


def _cuda_driver_version() -> str | None:
    """Asks the driver itself, since a CPU build of torch cannot."""
    import ctypes

    for name in ("libcuda.so.1", "nvcuda.dll"):
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        version = ctypes.c_int()
        if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 and version.value:
            return f"{version.value // 1000}.{version.value % 1000 // 10}"
    return None


def format_info(info: dict[str, Any]) -> str:
    """The result of build_info() as aligned lines for a terminal."""

    def listed(values: list[str], otherwise: str) -> str:
        return ", ".join(values) if values else otherwise

    torch_cuda = f" (CUDA {info['torch_cuda']})" if info["torch_cuda"] else " (CPU only)"
    lines = {
        "sparsemoe": info["version"],
        "torch": info["torch"] + torch_cuda,
        "compiled by": info["compiler"],
        "CUDA code": listed(info["cuda_archs"], "none: built without CUDA"),
        "CPU code": listed(info["cpu_isas"], "none"),
        "CUDA driver": info["cuda_driver"] or "none",
        "GPUs": listed(info["gpus"], "none"),
        "threads": str(info["threads"]),
        "will use": listed(info["will_use"], "nothing"),
    }
    if info["expert_products"]:
        lines["experts by"] = listed(info["expert_products"], "") + " kernels"
    if info["gpus"] and not any(use.startswith("cuda") for use in info["will_use"]):
        reason = "holds no code for this GPU" if info["cuda_archs"] else "was built without CUDA"
        lines["note"] = f"the library {reason}: reinstall it with nvcc on the PATH"
    return "\n".join(f"{name:<12} {value}" for name, value in lines.items())
