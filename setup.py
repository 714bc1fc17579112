"""Compiles csrc/ into sparsemoe/_C.abi3.so. Everything else is in pyproject.toml.

Environment: FORCE_CUDA=1 compiles the CUDA kernels where no GPU is seen, FORCE_CUDA=0 leaves them
out, TORCH_CUDA_ARCH_LIST="8.0;9.0a" chooses for which GPUs, MAX_JOBS limits the parallel jobs,
CXX and CUDA_HOME choose the compilers.
"""

import importlib.metadata
import os
import sys
from pathlib import Path

import setuptools

sys.path.insert(0, str(Path(__file__).resolve().parent / "tools"))
import build_config as config

COMPILING = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}


def compiled_library():
    """The extension and the command that builds it, as arguments of setup()."""
    # Under pip's build isolation the user's torch is not on sys.path. It goes last, so that the
    # build's own requirements come first.
    sys.path += [d for d in config.user_site_dirs() if d not in sys.path]
    installed = config.find_torch(sys.path)
    if installed is None:
        raise config.BuildError(
            "sparsemoe is built against torch, and there is none here: "
            f"install {config.TORCH_REQUIREMENT}."
        )
    config.check_torch(installed)
    config.check_compiler()

    # One ninja for builds with and without isolation: each version starts over where it finds
    # another's log.
    scripts = Path(sys.executable).parent
    if (scripts / "ninja").exists():
        os.environ["PATH"] = os.pathsep.join([str(scripts), os.environ["PATH"]])

    import torch
    from torch.utils import cpp_extension

    cuda_home = config.find_cuda_home()
    cuda, line = config.decide_cuda(
        os.environ.get("FORCE_CUDA"), cuda_home, torch.cuda.is_available()
    )
    targets, include_dirs, library_dirs = [], [str(config.ROOT / "csrc")], []
    if cuda:
        nvcc = config.nvcc_version(cuda_home)
        config.check_cuda_version(nvcc, torch.version.cuda)
        gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or (
            config.archs_of_gpus(gpus) if gpus else config.DEFAULT_CUDA_ARCHS
        )
        targets = config.parse_arch_list(archs)
        line += f" with CUDA {nvcc} for {', '.join(targets)}"
        include_dirs.append(str(cuda_home / "include"))
        library_dirs = config.cuda_library_dirs(cuda_home)
        # A torch without CUDA leaves this unset, and then .cu files cannot be compiled.
        cpp_extension.CUDA_HOME = str(cuda_home)
    print(f"sparsemoe: {line}.", flush=True)

    class BuildExt(cpp_extension.BuildExtension):
        def finalize_options(self):
            super().finalize_options()
            # Kept between calls (an editable install would use a temporary folder), so that only
            # what changed is compiled again.
            self.build_temp = str(config.ROOT / "build" / ("cuda" if cuda else "cpu"))

        def build_extensions(self):
            # A torch without CUDA does not tell ninja which headers a .cu file includes.
            config.remove_older_than_headers(Path(self.build_temp))
            super().build_extensions()

    extension = cpp_extension.CppExtension(
        "sparsemoe._C",
        config.sources(cuda),
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        extra_compile_args=config.compile_flags(targets),
        extra_link_args=config.link_flags(cuda),
        py_limited_api=True,
    )
    return {"ext_modules": [extension], "cmdclass": {"build_ext": BuildExt}}


def main():
    if int(importlib.metadata.version("setuptools").split(".")[0]) < 77:
        raise config.BuildError(
            "sparsemoe is built with setuptools 77 or later: pip install --upgrade setuptools."
        )
    arguments = compiled_library() if COMPILING & set(sys.argv) else {}
    # No Python symbol is in the library, so one wheel serves every Python.
    setuptools.setup(options={"bdist_wheel": {"py_limited_api": "cp310"}}, **arguments)


try:
    main()
except config.BuildError as error:
    raise SystemExit(str(error)) from None
