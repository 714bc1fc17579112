"""Checks that a built library runs beside any torch from 2.11, with or without CUDA, on any Python.

    python tools/audit_library.py python/sparsemoe/_C.abi3.so dist/*.whl

Prints one line for each library and exits with 1 if a rule is broken. Needs readelf and nm.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

TORCH_LIBRARIES = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
SYSTEM_LIBRARY = re.compile(
    r"(libstdc\+\+|libgcc_s|libm|libc|libdl|librt|libpthread|ld-linux-[\w-]+)\.so\.\d+"
)
# Mangled names of anything in the namespaces at, c10, caffe2 or torch: torch's C++ ABI, which
# changes from version to version. The stable ABI's functions are plain C (aoti_torch_*, torch_*).
TORCH_CXX = re.compile(r"^_Z.*(?<!\d)(2at|3c10|6caffe2|5torch)")
PYTHON = re.compile(r"^_?Py[A-Z_]")
CUDA = re.compile(r"^(cuda[A-Z]|cu[A-Z]|__cuda)")


def broken_rules(needed: Iterable[str], undefined: Iterable[tuple[str, str]]) -> list[str]:
    """One sentence for each broken rule. `undefined` holds (kind, symbol): kind is nm's letter,
    'w' or 'v' for a weak symbol, 'U' for one without which the library does not load."""
    needed = list(needed)
    problems = [
        f"needs {name}, which is neither torch's own nor the system's"
        for name in needed
        if name not in TORCH_LIBRARIES and not SYSTEM_LIBRARY.fullmatch(name)
    ]
    if "libtorch.so" not in needed:
        problems.append("does not need libtorch.so, so the CUDA stream would not be found")
    for kind, symbol in undefined:
        if TORCH_CXX.match(symbol):
            problems.append(f"uses {symbol}, a C++ symbol of torch outside the stable ABI")
        elif PYTHON.match(symbol):
            problems.append(f"uses {symbol}, a symbol of Python")
        elif CUDA.match(symbol):
            problems.append(f"uses {symbol}: the CUDA runtime must be linked statically")
        elif "_cuda_" in symbol and kind == "U":
            problems.append(f"uses {symbol}, which a CPU build of torch lacks: declare it weak")
    return problems


def parse_needed(readelf: str) -> list[str]:
    return re.findall(r"\(NEEDED\).*\[(.+)\]", readelf)


def parse_undefined(nm: str) -> list[tuple[str, str]]:
    """Kind and name, without the version that follows an @."""
    lines = re.findall(r"^\s*([Uwv])\s+([^\s@]+)", nm, re.MULTILINE)
    return [(kind, name) for kind, name in lines]


def audit(library: Path) -> list[str]:
    def output(*command: str) -> str:
        return subprocess.run(
            [*command, str(library)], check=True, capture_output=True, text=True
        ).stdout

    problems = broken_rules(
        parse_needed(output("readelf", "--dynamic", "--wide")),
        parse_undefined(output("nm", "-D", "--undefined-only")),
    )
    if "sparsemoe_build_info" not in output("nm", "-D", "--defined-only"):
        problems.append("does not export sparsemoe_build_info")
    return problems


def libraries(path: Path, scratch: Path) -> list[Path]:
    """The file itself, or the libraries in a wheel."""
    if path.suffix != ".whl":
        return [path]
    with zipfile.ZipFile(path) as wheel:
        names = [n for n in wheel.namelist() if n.endswith(".so")]
        return [Path(wheel.extract(n, scratch / path.name)) for n in names]


def main(paths: list[str]) -> int:
    if not paths:
        print(__doc__)
        return 2
    failed = False
    for path in map(Path, paths):
        with tempfile.TemporaryDirectory() as scratch:
            found = libraries(path, Path(scratch))
            problems = [p for library in found for p in audit(library)]
            if not found:
                problems = ["holds no library"]
        for problem in problems:
            print(f"{path}: {problem}")
        if not problems:
            print(f"{path}: passed")
        failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
