"""What a benchmark is made of: an operation, its implementations, its floor and its check."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from bench import peers, timing

Call = Callable[[], Any]
Table = dict[str, Callable[[Any], Call]]  # implementation -> inputs -> a call without arguments

torch._dynamo.config.recompile_limit = 64  # one function, many shapes


@dataclass(frozen=True, eq=False)
class Op:
    """One row of a family's table.

    calls   its implementations; 'reference' is what the others are compared with
    counts  what the floor counts, in words; nbytes and flops are the same as functions of the
            inputs
    view    makes of a result the tensors on which implementations must agree
    ties    the share of integers that may differ where ties are broken differently
    tolerance of the relative error of reals, if not that of the shape's dtype
    rough   implementation -> its own tolerance
    facts   makes of a result more figures for the results file
    """

    name: str
    calls: Table
    counts: str
    nbytes: Callable[[Any], float]
    flops: Callable[[Any], float] = lambda inputs: 0
    view: Callable[[Any, Any], Iterable[Tensor]] = lambda inputs, result: tensors(result)
    ties: float = 0.0
    tolerance: float | None = None
    rough: Mapping[str, float] = field(default_factory=dict)
    facts: Callable[[Any, Any], dict[str, float]] = lambda inputs, result: {}


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


def beside(
    modules: dict[str, Any], function: str | Callable[..., Any], names: str, **options: Any
) -> Table:
    """The function of that name of each module, or one whose first argument is the module."""

    def of(module: Any) -> Any:
        if isinstance(function, str):
            return getattr(module, function)
        return partial(function, module)

    return {name: call(of(module), names, **options) for name, module in modules.items()}


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


def captured(table: Table) -> Table:
    """The replay of a CUDA graph of each call, which must not wait for the device. A call that
    changes a state has a method `reset`, which undoes the calls before the capture."""

    def graph_of(build: Callable[[Any], Call]) -> Callable[[Any], Call]:
        def capture(inputs: Any) -> Call:
            call = build(inputs)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # what the first calls set up is no part of the graph
                call()
                call()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = call()
            if hasattr(call, "reset"):
                call.reset()
            return partial(_replay, graph, result)

        return capture

    return {name: graph_of(build) for name, build in table.items()}


def _replay(graph: Any, result: Any) -> Any:
    graph.replay()
    return result


def _gradients(
    inputs: Any, forward: Call, leaves: str, retain_graph: bool = False
) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        y = tensors(forward())[0]
        wanted = [getattr(inputs, name) for name in leaves.split()]
        return torch.autograd.grad(y, wanted, inputs.gradient(y), retain_graph=retain_graph)


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def difference(
    op: Op, shape: Any, result: list[Tensor], expected: list[Tensor], name: str = ""
) -> str | None:
    """Why the result of implementation `name` is wrong, or None.

    Reals: the norm of the difference over the norm. Integers: the share that differs.
    """
    for index, (a, b) in enumerate(zip(result, expected, strict=True)):
        if a.shape != b.shape:
            return f"output {index} has shape {tuple(a.shape)} and not {tuple(b.shape)}"
        if b.is_floating_point():
            allowed = op.rough.get(name, op.tolerance or TOLERANCE[shape.dtype])
            error = _relative_error(a, b)
        else:
            allowed = op.ties
            error = (a != b).float().mean().item()
        if not error <= allowed:
            return f"output {index} is wrong by {error:.2g}"
    return None


def _relative_error(a: Tensor, b: Tensor) -> float:
    """Part by part: weights in float32 would not all fit beside those there already."""
    norms = [
        torch.stack([(x.float() - y.float()).norm(), y.float().norm()])
        for x, y in zip(_parts(a), _parts(b), strict=True)
    ]
    error, norm = torch.stack(norms).norm(dim=0).tolist()
    return error / max(norm, 1e-30)


def _parts(a: Tensor) -> tuple[Tensor, ...]:
    return a[None].unbind() if a.dim() == 0 else a.chunk(8)


def parameters(cases: Iterable[tuple[Any, Op, str]]) -> list[Any]:
    """For pytest: (shape, op, implementation), without peers that are not installed."""
    return [
        pytest.param(shape, op, name, id=f"{shape.name}-{op.name}-{name}")
        for shape, op, name in cases
        if name not in peers.KNOWN or name in peers.INSTALLED
    ]


def measurement(op: Op, inputs: Any, call: Call, ms: float | None = None) -> dict[str, Any]:
    """Time (`ms`, if it is known), rates and the ratio to the floor; extra memory on a GPU."""
    nbytes, flops = op.nbytes(inputs), op.flops(inputs)
    floor = nbytes / timing.copy_rate(nbytes)
    found: dict[str, Any] = {}
    if timing.DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        found["extra MiB"] = round((torch.cuda.max_memory_allocated() - before) / 2**20)
    ms = ms or timing.milliseconds(call)
    found |= {"ms": ms, "GB/s": nbytes / ms / 1e6}
    if flops:
        most = timing.matmul_rate(inputs.matmul_dtype)
        floor = max(floor, flops / most)
        found |= {"TFLOP/s": flops / ms / 1e9, "% of matmul": 1e5 * flops / ms / most}
    found |= {"floor ms": 1e3 * floor, "ratio to floor": ms / 1e3 / floor}
    return {name: float(f"{value:.4g}") for name, value in found.items()}
