"""What a benchmark is made of: an operation, its implementations, its floor and its check."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import timing

Call = Callable[[], Any]
Table = dict[str, Callable[[Any], Call]]  # implementation -> inputs -> a call without arguments

torch._dynamo.config.recompile_limit = 64  # one function, many shapes


@dataclass(frozen=True, eq=False)
class Op:
    """One row of a family's table.

    calls   its implementations; 'reference' is what the others are compared with
    counts  what the floor counts, in words; nbytes and flops are the same as functions of a shape
    view    makes of a result the tensors on which implementations must agree
    ties    whether implementations may break ties differently
    tolerance of the relative error of reals, if not that of the shape's dtype
    """

    name: str
    calls: Table
    counts: str
    nbytes: Callable[[Any], float]
    flops: Callable[[Any], float] = lambda shape: 0
    view: Callable[[Any, Any], Iterable[Tensor]] = lambda inputs, result: tensors(result)
    ties: bool = False
    tolerance: float | None = None


def tensors(result: Any) -> list[Tensor]:
    result = [result] if isinstance(result, Tensor) else result
    return [tensor for tensor in result if tensor is not None]


def call(function: Any, names: str, **options: Any) -> Callable[[Any], partial]:
    """`names` are the attributes of the inputs that are the arguments: 'x plan weights=weights'."""

    def build(inputs: Any) -> partial:
        pairs = [name.rpartition("=") for name in names.split()]
        args = [getattr(inputs, name) for key, _, name in pairs if not key]
        return partial(
            function,
            *args,
            **{key: getattr(inputs, name) for key, _, name in pairs if key},
            **options,
        )

    return build


def plain(function: Any, names: str) -> Table:
    """A plain PyTorch expression, eager and through torch.compile in its default mode."""
    build = call(function, names)

    def compiled(inputs: Any) -> partial:
        eager = build(inputs)
        return partial(torch.compile(eager.func, dynamic=False), *eager.args, **eager.keywords)

    return {"torch": build, "torch-compiled": compiled}


def forward_backward(table: Table, leaves: str) -> Table:
    """The gradients, forward pass included, of the first output of each call."""

    def with_gradient(build: Callable[[Any], Call]) -> Callable[[Any], Call]:
        return lambda inputs: partial(_gradients, inputs, build(inputs), leaves)

    return {name: with_gradient(build) for name, build in table.items()}


def backward(table: Table, leaves: str) -> Table:
    """The gradients alone: the forward pass runs once."""

    def without_forward(build: Callable[[Any], Call]) -> Callable[[Any], Call]:
        def once(inputs: Any) -> Call:
            with torch.enable_grad():
                y = tensors(build(inputs)())[0]
            return partial(_gradients, inputs, lambda: y, leaves, retain_graph=True)

        return once

    return {name: without_forward(build) for name, build in table.items()}


def _gradients(
    inputs: Any, forward: Call, leaves: str, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        y = tensors(forward())[0]
        wanted = [getattr(inputs, name) for name in leaves.split()]
        return torch.autograd.grad(y, wanted, inputs.gradient(y), retain_graph=retain_graph)


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def difference(op: Op, shape: Any, result: list[Tensor], expected: list[Tensor]) -> str | None:
    """Why the result is wrong, or None.

    Reals: the norm of the difference over the norm. Integers: the share that differs, none or with
    ties one in a thousand.
    """
    for index, (a, b) in enumerate(zip(result, expected, strict=True)):
        if a.shape != b.shape:
            return f"output {index} has shape {tuple(a.shape)} and not {tuple(b.shape)}"
        if b.is_floating_point():
            allowed = op.tolerance or TOLERANCE[shape.dtype]
            error = (a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30)
        else:
            allowed = 1e-3 if op.ties else 0.0
            error = (a != b).float().mean()
        if not error.item() <= allowed:
            return f"output {index} is wrong by {error.item():.2g}"
    return None


def measurement(op: Op, shape: Any, call: Call, ms: float | None = None) -> dict[str, Any]:
    """Time (`ms`, if it is known), rates and the ratio to the floor; extra memory on a GPU."""
    nbytes, flops = op.nbytes(shape), op.flops(shape)
    floor = nbytes / timing.copy_rate(nbytes)
    if flops:
        floor = max(floor, flops / timing.matmul_rate(shape.dtype))
    found: dict[str, Any] = {}
    if timing.DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found["extra MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    ms = ms or timing.milliseconds(call)
    found |= {"ms": ms, "GB/s": nbytes / ms / 1e6}
    if flops:
        found["TFLOP/s"] = flops / ms / 1e9
    found |= {"floor ms": 1e3 * floor, "ratio to floor": ms / 1e3 / floor}
    return {name: float(f"{value:.4g}") for name, value in found.items()}
