"""Measures and writes a results file: python -m bench.run --family experts --out FILE

Where there is a GPU, the compiled expressions and the peers' kernels are compiled by several
processes first. Arguments that are not listed go to pytest: -k "combine and Qwen3".
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = [path.stem.removeprefix("bench_") for path in sorted(ROOT.glob("bench/bench_*.py"))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.run", description=__doc__)
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--commit", metavar="ID", help="what is measured, where git does not say")
    parser.add_argument(
        "--family", action="append", choices=FAMILIES, help="may be repeated; all without it"
    )
    parser.add_argument("--compilers", type=int, metavar="N", help="8 with a GPU, otherwise 0")
    parser.add_argument("--compile-seconds", type=float, default=120, help="give up after these")
    args, rest = parser.parse_known_args()
    count = 8 * torch.cuda.is_available() if args.compilers is None else args.compilers
    files = [f"bench/bench_{family}.py" for family in args.family or FAMILIES]
    pytest = [sys.executable, "-m", "pytest", *files, "-q", *rest]
    alone = {"TORCHINDUCTOR_COMPILE_THREADS": "1", "QUACK_COMPILE_WORKERS": "1"}
    compilers = [
        subprocess.Popen(
            [*pytest, "--compile-only", f"{index}/{count}"],
            cwd=ROOT,
            env=os.environ | alone,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for index in range(count)
    ]
    deadline = time.monotonic() + args.compile_seconds
    for index, process in enumerate(compilers):
        print(f"compiling: {index} of {count} processes are done", flush=True)
        try:
            process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:  # what is missing is compiled when it is measured
            process.kill()
    commit = ["--commit", args.commit] if args.commit else []
    run = ["--benchmark-only", "--benchmark-quiet", "--no-header", "--tb=short", "-rN"]
    out = str(Path(args.out).resolve())
    return subprocess.call([*pytest, *run, "--results", out, *commit], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
