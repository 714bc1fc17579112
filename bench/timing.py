"""Clocks, the ceilings of the machine, and what the machine is."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def synchronized_clock() -> float:
    """Seconds, read when the device is idle: pytest-benchmark's timer."""
    synchronize()
    return time.perf_counter()


def milliseconds(call: Callable[[], Any], seconds: float = 0.15) -> float:
    """The median time of one call of many, after two to warm up.

    On a GPU this is device time with the L2 flushed before each call. On a CPU it is wall time.
    """
    return statistics.median(times(call, seconds))


def times(call: Callable[[], Any], seconds: float) -> list[float]:
    call()
    start = synchronized_clock()
    call()
    host = time.perf_counter() - start  # what enqueueing costs, at least
    total = synchronized_clock() - start
    if DEVICE.type == "cpu":
        return [_wall(call) for _ in range(_repeats(total, seconds))]
    # Read, not written: the call would have to wait until what is in the cache is written back.
    flush = torch.zeros(5 * _l2_bytes() // 4, device=DEVICE)
    # The GPU waits until the host has enqueued the call, so that launches are not counted.
    wait = int(2e9 * min(1.5 * host + 1e-4, 0.02))
    events = []
    for _ in range(_repeats(total + wait / 2e9, seconds)):
        flush.sum()
        torch.cuda._sleep(wait)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        events.append((begin, end))
    synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def in_turns(
    builders: dict[str, Callable[[], Callable[[], Any]]],
    seconds: float = 1.5 if DEVICE.type == "cuda" else 3,
) -> dict[str, float]:
    """The median time in milliseconds of the call that each builder makes. They take turns, so that
    a GPU's heat, and whatever else a CPU does meanwhile, fall on all. What fails is left out."""
    calls: dict[str, Callable[[], Any]] = {}
    times: dict[str, list[float]] = {name: [] for name in builders}

    def turn(name: str, repeats: int) -> None:
        try:
            if name not in calls:
                calls[name] = builders[name]()
                calls[name]()
            if DEVICE.type == "cuda":
                times[name].append(milliseconds(calls[name], 0.05))
            else:  # the last of several: with the caches as the call itself leaves them
                times[name].append([_wall(calls[name]) for _ in range(repeats)][-1])
        except Exception:  # of any kind: its own benchmark runs it again and reports it
            del times[name]
            calls.pop(name, None)

    for name in list(times):
        turn(name, 2)
    repeats = 3 if min((found[0] for found in times.values()), default=0) < 20 else 1
    stop = time.perf_counter() + seconds
    for count in range(100):
        if count >= 5 and time.perf_counter() > stop:
            break
        for name in list(times):
            turn(name, repeats)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def _repeats(seconds_each: float, seconds: float) -> int:
    return min(max(int(seconds / seconds_each), 3), 100)


def _wall(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties(DEVICE).L2_cache_size


def copy_rate(nbytes: float) -> float:
    """Bytes read and written per second by a copy that moves `nbytes` in all.

    On a GPU always a copy of 1 GiB. A CPU's caches are larger than many operations' tensors, so
    there the size is the operation's own, within 1 MiB and 1 GiB.
    """
    size = 2**30 if DEVICE.type == "cuda" else min(max(int(nbytes) // 2, 2**20), 2**30)
    return _copy_rate(2 ** round(math.log2(size)))


@cache
def _copy_rate(size: int) -> float:
    source = torch.ones(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2e3 * size / _least(lambda: target.copy_(source))


@cache
def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of a large square matrix product of this type."""
    n = 8192 if DEVICE.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    with torch.no_grad():
        return 2e3 * n**3 / _least(lambda: a @ b)


def _least(call: Callable[[], Any]) -> float:
    """A ceiling on a CPU is the best of many calls: others may use its memory and cores too."""
    return milliseconds(call) if DEVICE.type == "cuda" else min(times(call, 0.5))


def environment(commit: str | None = None) -> dict[str, Any]:
    """The machine, its versions and its ceilings. Nothing that names the host."""
    found: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else _cpu_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit or _output("git", "describe", "--always", "--dirty", "--exclude=*"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if DEVICE.type == "cuda":
        query = "--query-gpu=driver_version"
        found["cuda"] = torch.version.cuda
        found["driver"] = _output("nvidia-smi", query, "--format=csv,noheader")
        found["L2 cache flushed by"] = "reading"
        found["copy of 1 GiB, TB/s"] = round(copy_rate(0) / 1e12, 3)
        found["matmul 8192^3 bf16, TFLOP/s"] = round(matmul_rate(torch.bfloat16) / 1e12, 1)
    else:
        found["threads"] = torch.get_num_threads()
        found["load before"] = os.getloadavg()[0]  # anything above 0 disturbs
        found["copy of 1 GiB, GB/s"] = round(copy_rate(2**31) / 1e9, 1)
        found["matmul 2048^3 fp32, GFLOP/s"] = round(matmul_rate(torch.float32) / 1e9, 1)
    first = _output(sys.executable, "-m", "bench.first_call")
    found["first forward + backward of nn.MoE in a new process, s"] = first
    for name in (
        "triton",
        "moe-ops",
        "liger-kernel",
        "scattermoe",
        "sonic-moe",
        "vector-quantize-pytorch",
    ):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip().splitlines()[0]
