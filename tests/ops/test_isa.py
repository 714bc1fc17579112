"""The variants of the CPU kernels for older processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
# family -> its files, which of their tests run, and which do not: those are the same for every
# variant, or long
FAMILIES = {
    "moe": (
        ["gate", "expert_choice", "rows", "losses", "experts"],
        "dtype or width or groups or nan",
        "ragged or few or recomputing or sums or frozen",
    ),
    "rvq": (
        ["encode", "decode", "gradients", "beam", "ema"],
        "size or data or dtype or nan or finite or update or sums or test_encode or test_decode",
        "70000 or float64 or ranks or repeated",
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_variant(isa, family):
    """In a process of its own: a process chooses once."""
    files, cases, left_out = FAMILIES[family]
    check = (
        "import pytest, sys, sparsemoe\n"
        f"assert sparsemoe.build_info()['cpu_isa_in_use'] in ('baseline', {isa!r})\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = [str(FOLDER / f"test_{family}_{name}.py") for name in files]
    only = ["-q", "-p", "no:cacheprovider", "-k", f"cpu and ({cases}) and not ({left_out})"]
    result = subprocess.run(
        [sys.executable, "-c", check, *only, *tests],
        env=os.environ | {"SPARSEMOE_CPU_ISA": isa},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
