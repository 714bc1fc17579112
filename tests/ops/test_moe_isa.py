"""The variants of the CPU kernels for older processors."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent
FILES = ["gate", "expert_choice", "rows", "losses", "experts"]
CASES = "dtype or width or groups or nan"
LEFT_OUT = "ragged or few or recomputing or sums or frozen"  # the same for every variant


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_variant(isa):
    """In a process of its own: a process chooses once."""
    check = (
        "import pytest, sys, sparsemoe\n"
        f"assert sparsemoe.build_info()['cpu_isa_in_use'] in ('baseline', {isa!r})\n"
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    tests = [str(FOLDER / f"test_moe_{name}.py") for name in FILES]
    only = ["-q", "-p", "no:cacheprovider", "-k", f"cpu and ({CASES}) and not ({LEFT_OUT})"]
    result = subprocess.run(
        [sys.executable, "-c", check, *only, *tests],
        env=os.environ | {"SPARSEMOE_CPU_ISA": isa},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
