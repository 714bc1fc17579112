"""Which kernels an operation runs: python -m bench.profile combine --shape OLMoE --name torch"""

from __future__ import annotations

import argparse
import importlib
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import timing
from bench.run import FAMILIES


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.profile", description=__doc__)
    parser.add_argument("op", help="as in docs/benchmarks.md, e.g. 'combine, backward'")
    parser.add_argument("--shape", default="", help="the first whose name begins so")
    parser.add_argument("--name", default="sparsemoe", help="implementation")
    parser.add_argument("--calls", type=int, default=10)
    parser.add_argument("--rows", type=int, default=15)
    args = parser.parse_args()
    families = [importlib.import_module(f"bench.bench_{name}") for name in FAMILIES]
    op = choose([op for family in families for op in family.OPS], args.op, exact=True)
    family = next(family for family in families if op in family.OPS)
    shape = choose(family.SHAPES, args.shape)
    inputs = family.Inputs(shape)
    gpu = timing.DEVICE.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.no_grad():
        call = op.calls[args.name](inputs)
        print(f"{op.name}, {args.name}, {shape}: {timing.milliseconds(call):.4g} ms a call")
        with profile(activities=activities, record_shapes=False) as profiler:
            for _ in range(args.calls):
                call()
            timing.synchronize()
    total = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, total))
    events = [event for event in events if getattr(event, total) > 0][: args.rows]
    if gpu:
        kernels = [event for event in events if event.device_type.name == "CUDA"]
        events = kernels or events
    for event in events:
        each = getattr(event, total) / 1e3 / args.calls
        print(f"{each:9.4f} ms  {event.count / args.calls:6.1f} x  {event.key[:100]}")


def choose(options: Any, name: str, exact: bool = False) -> Any:
    for option in options:
        if option.name == name or (not exact and option.name.startswith(name)):
            return option
    raise SystemExit(f"no {name!r}; there are: {'; '.join(option.name for option in options)}")


if __name__ == "__main__":
    main()
