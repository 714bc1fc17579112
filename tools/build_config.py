"""What setup.py decides before it compiles: which torch, which compiler, CUDA or not, which flags.

Small functions without side effects, so that tests can call them. Nothing here imports torch.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MIN_TORCH = (2, 11)
TORCH_REQUIREMENT = f"torch>={MIN_TORCH[0]}.{MIN_TORCH[1]}"
# The oldest stable ABI that the library asks of the torch it is loaded into.
TORCH_TARGET = f"0x{MIN_TORCH[0]:02x}{MIN_TORCH[1]:02x}000000000000"
DEFAULT_CUDA_ARCHS = "8.0+PTX;9.0a"


class BuildError(Exception):
    """A reason not to build, in one sentence for the user."""


# --- torch -------------------------------------------------------------------------------------


def user_site_dirs() -> list[str]:
    """Where the user's packages are, which pip's build isolation hides from sys.path."""
    dirs = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if sys.prefix == sys.base_prefix:
        dirs.append(site.getusersitepackages())
    elif _sees_system_packages(Path(sys.prefix)):
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        dirs += [sysconfig.get_path("purelib", vars=base), sysconfig.get_path("platlib", vars=base)]
    return list(dict.fromkeys(d for d in dirs if os.path.isdir(d)))


def _sees_system_packages(venv: Path) -> bool:
    config = venv / "pyvenv.cfg"
    text = config.read_text() if config.is_file() else ""
    return re.search(r"(?mi)^include-system-site-packages\s*=\s*true", text) is not None


def find_torch(path: Iterable[str]) -> str | None:
    """The version of the torch installed in one of the folders of `path`, or None."""
    for distribution in importlib.metadata.distributions(name="torch", path=list(path)):
        return distribution.version
    return None


def torch_to_require(installed: str | None) -> list[str]:
    """The build requirement for torch: none where one is installed, for any version will do
    that is new enough. Listing it always would download the newest into each build."""
    if installed is None:
        return [TORCH_REQUIREMENT]
    check_torch(installed)
    return []


def check_torch(version: str) -> None:
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:2])
    if numbers < MIN_TORCH:
        needed = ".".join(map(str, MIN_TORCH))
        raise BuildError(
            f"sparsemoe needs torch {needed} or later and this environment has torch {version}: "
            f'upgrade it first (pip install --upgrade "{TORCH_REQUIREMENT}").'
        )


# --- the C++ compiler --------------------------------------------------------------------------

_PROBE = """
#if __cplusplus < 201703L
no_cxx17
#elif defined(__clang__)
version clang __clang_major__
#elif defined(__GNUC__)
version gcc __GNUC__
#else
version other 0
#endif
"""
_OLDEST = {"gcc": 9, "clang": 9}


def check_compiler(command: str | None = None) -> None:
    """Raises BuildError unless `command` ($CXX or c++) is a compiler that knows C++17."""
    command = command or os.environ.get("CXX") or "c++"
    need = "sparsemoe needs a C++17 compiler"
    fix = "install g++ 9 or later (or clang++), or set CXX to one"
    try:
        run = subprocess.run(
            [*command.split(), "-std=c++17", "-x", "c++", "-E", "-P", "-"],
            input=_PROBE,
            capture_output=True,
            text=True,
        )
    except OSError:
        raise BuildError(f"{need} and '{command}' is not one: {fix}.") from None
    found = re.search(r"version (\w+) (\d+)", run.stdout) if run.returncode == 0 else None
    if found is None:
        raise BuildError(f"{need} and '{command}' is not one: {fix}.")
    name, major = found[1], int(found[2])
    if major < _OLDEST.get(name, 0):
        raise BuildError(f"{need} and '{command}' is {name} {major}: {fix}.")


# --- CUDA --------------------------------------------------------------------------------------


def parse_arch_list(text: str) -> list[str]:
    """'8.0+PTX;9.0a' -> ['sm_80', 'compute_80', 'sm_90a']: what is compiled, machine code (sm) or
    PTX (compute). Entries may be separated by semicolons, commas or spaces."""
    targets: list[str] = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST holds '{entry}': "
                "each entry must look like 8.0, 9.0a or 9.0+PTX."
            )
        number = match[1] + match[2] + match[3]
        targets += [f"sm_{number}"] + ([f"compute_{number}"] if match[4] else [])
    return list(dict.fromkeys(targets))


def archs_of_gpus(capabilities: Iterable[tuple[int, int]]) -> str:
    """An arch list for the GPUs at hand. 9.0 becomes 9.0a, which Hopper's matrix units need."""
    names = {f"{major}.{minor}" + ("a" if (major, minor) == (9, 0) else "")
             for major, minor in capabilities}  # fmt: skip
    return ";".join(sorted(names))


def gencode_flags(targets: Iterable[str]) -> list[str]:
    flags = []
    for target in targets:
        number = target.split("_")[1]
        flags.append(f"-gencode=arch=compute_{number},code={target}")
    return flags


def find_cuda_home(env: Mapping[str, str] = os.environ) -> Path | None:
    """The CUDA toolkit: $CUDA_HOME, $CUDA_PATH, that of the nvcc on the PATH, /usr/local/cuda."""
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if env.get(name) and Path(env[name], "bin/nvcc").exists():
            return Path(env[name])
    nvcc = shutil.which("nvcc", path=env.get("PATH"))
    if nvcc:
        # nvcc may be a link or a script: it knows best where its toolkit is.
        dry = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        top = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
        home = Path(top[1].strip()) if top else Path(nvcc).resolve().parent.parent
        if (home / "bin/nvcc").exists():
            return home.resolve()
    default = Path("/usr/local/cuda")
    return default if (default / "bin/nvcc").exists() else None


def nvcc_version(cuda_home: Path) -> str:
    text = subprocess.run(
        [cuda_home / "bin/nvcc", "--version"], capture_output=True, text=True
    ).stdout
    found = re.search(r"release (\d+\.\d+)", text)
    return found[1] if found else "unknown"


def cuda_library_dirs(cuda_home: Path) -> list[str]:
    places = ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"]
    return [str(cuda_home / p) for p in places if (cuda_home / p / "libcudart_static.a").exists()][
        :1
    ]


def decide_cuda(force: str | None, cuda_home: Path | None, has_gpu: bool) -> tuple[bool, str]:
    """Whether to compile the CUDA kernels, and a line that says so. `force` is $FORCE_CUDA."""
    forced = (force or "").strip().lower()
    if forced in ("0", "off", "no", "false"):
        return False, "FORCE_CUDA=0: building the CPU kernels only"
    if cuda_home is None:
        if forced:
            raise BuildError(
                f"FORCE_CUDA={force} is set and there is no nvcc: "
                "put it on the PATH or set CUDA_HOME."
            )
        return False, "no nvcc found: building the CPU kernels only"
    if forced:
        return True, f"FORCE_CUDA={force}: building the CPU and CUDA kernels"
    if has_gpu:
        return True, "nvcc and a GPU found: building the CPU and CUDA kernels"
    return False, "nvcc found but no GPU (FORCE_CUDA=1 overrides): building the CPU kernels only"


def check_cuda_version(nvcc: str, torch_cuda: str | None) -> None:
    """torch's CUDA and nvcc's must agree in the major version."""
    if torch_cuda and nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        raise BuildError(
            f"nvcc is of CUDA {nvcc} and torch of CUDA {torch_cuda}: set CUDA_HOME to a toolkit of "
            f"CUDA {torch_cuda.split('.')[0]}, or FORCE_CUDA=0 for the CPU kernels only."
        )


# --- sources and flags -------------------------------------------------------------------------


def sources(cuda: bool, root: Path = ROOT) -> list[str]:
    """The sources of the op library, relative to `root`. CMakeLists.txt globs the same."""
    patterns = ["csrc/*.cpp", "csrc/*/*.cpp"] + (["csrc/*/*.cu"] if cuda else [])
    found = (p.relative_to(root) for pattern in patterns for p in root.glob(pattern))
    return sorted(str(p) for p in found if p.parts[1] != "numpy")


def remove_older_than_headers(build: Path, root: Path = ROOT) -> None:
    """Removes what was compiled from .cu files before the last change of a header."""
    headers = [p for p in (root / "csrc").rglob("*") if p.suffix in (".h", ".cuh")]
    newest = max((p.stat().st_mtime for p in headers), default=0)
    for source in (root / "csrc").rglob("*.cu"):
        compiled = build / source.relative_to(root).with_suffix(".o")
        if compiled.exists() and compiled.stat().st_mtime < newest:
            compiled.unlink()


def version(root: Path = ROOT) -> str:
    text = (root / "python/sparsemoe/_version.py").read_text()
    return re.search(r'__version__ = "([^"]+)"', text)[1]  # type: ignore[index]


def compile_flags(cuda_targets: list[str], platform: str = sys.platform) -> dict[str, list[str]]:
    """Flags by compiler. An empty `cuda_targets` means a build without CUDA."""
    common = ["-std=c++17", "-O3", f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    cuda = ["-DUSE_CUDA"] if cuda_targets else []
    cxx = [
        *common,
        *cuda,
        "-g0",
        "-fvisibility=hidden",
        "-fvisibility-inlines-hidden",
        # Loops with comparisons and exp become vector code only where floating-point exceptions
        # and errno need not be kept. Results are the same.
        "-fopenmp-simd",
        "-fno-trapping-math",
        "-fno-math-errno",
        # Python's own flags may bring -fwrapv, under which fewer loops become vector code.
        "-fno-wrapv",
        f"-DSPARSEMOE_VERSION={version()}",
        f"-DSPARSEMOE_CUDA_TARGETS={','.join(cuda_targets)}",
    ]
    if platform == "darwin":
        cxx.append("-mmacosx-version-min=11.0")
    nvcc = [
        *common,
        *cuda,
        "--expt-relaxed-constexpr",
        "-lineinfo",
        "-Xcompiler=-fvisibility=hidden",
        # Without it Hopper's own kernels are not taken.
        *(["-DSPARSEMOE_SM_90A"] if "sm_90a" in cuda_targets else []),
    ]
    return {"cxx": cxx, "nvcc": nvcc + gencode_flags(cuda_targets)}


def link_flags(cuda: bool, platform: str = sys.platform) -> list[str]:
    if platform == "darwin":
        return []
    # cudart goes in whole and hidden, so that one library runs beside a torch of any CUDA.
    # libtorch must be among the needed libraries: through libtorch_cpu alone, the weak reference
    # to the current CUDA stream stays null even in a CUDA build of torch.
    cudart = ["-lcudart_static", "-lrt", "-ldl", "-lpthread"] if cuda else []
    return ["-Wl,--exclude-libs,ALL", *cudart, "-Wl,--no-as-needed", "-ltorch"]
