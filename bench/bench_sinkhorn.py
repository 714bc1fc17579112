"""Sinkhorn balancing beside the reference and plain PyTorch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from bench import inputs_sinkhorn, plain_sinkhorn, timing
from bench.case import Op, beside, call, captured, forward_backward, parameters, plain
from bench.inputs import GPU
from bench.inputs_sinkhorn import Inputs, Shape
from sparsemoe.ops import sinkhorn as ops
from sparsemoe.reference import sinkhorn as reference

SHAPES = inputs_sinkhorn.GPU if GPU else inputs_sinkhorn.CPU
STILL = "torch, until still"
ARGUMENTS = "logits iterations"

sinkhorn = {
    "sparsemoe": call(partial(ops.sinkhorn, check=False), ARGUMENTS),
    **beside({"reference": reference}, "sinkhorn", ARGUMENTS),
    **plain(plain_sinkhorn.by_logarithms, ARGUMENTS),
    "torch, products": call(plain_sinkhorn.by_products, ARGUMENTS),
    STILL: call(plain_sinkhorn.until_still, ARGUMENTS),
}
trained = {name: build for name, build in sinkhorn.items() if name != STILL}
replayed = captured({name: sinkhorn[name] for name in ("sparsemoe", "torch")})


def logits_bytes(inputs: Inputs) -> float:
    s = inputs.shape
    return s.problems * s.tokens * s.experts * s.dtype.itemsize


def plan_bytes(inputs: Inputs) -> float:
    s = inputs.shape
    return s.problems * s.tokens * s.experts * 4


def beside_a_copy(inputs: Inputs, result: Any) -> dict[str, float]:
    return {"copy of the logits, ms": inputs.copy_ms}


def forward_bytes(inputs: Inputs) -> float:
    return logits_bytes(inputs) + plan_bytes(inputs)


OPS = [
    Op(
        "sinkhorn",
        sinkhorn,
        "reads logits, writes the plan",
        forward_bytes,
        facts=beside_a_copy,
        tolerance=1e-4,
        rough={STILL: 0.5},  # stops where it likes
    ),
    Op(
        "sinkhorn, CUDA graph",
        {**replayed, "reference": sinkhorn["reference"]},
        "as sinkhorn",
        forward_bytes,
        tolerance=1e-4,
    ),
    Op(
        "sinkhorn, forward + backward",
        forward_backward(trained, "logits"),
        "the forward pass's; reads logits and the plan's gradient, writes the logits' gradient",
        lambda inputs: 3 * logits_bytes(inputs) + 2 * plan_bytes(inputs),
        tolerance=1e-3,
    ),
]


def wanted(shape: Shape, op: Op, name: str) -> bool:
    """The reference is there to be compared with. Compiled expressions on the first shapes, since
    each compilation takes seconds; graphs on the first. One problem at a time stops by itself."""
    if name == "reference" or ("graph" in op.name and (shape is not SHAPES[0] or not GPU)):
        return False
    if name == "torch-compiled":
        return shape in (SHAPES[:4] if GPU else SHAPES[:1])
    return not (name == STILL and shape.problems > 1)


CASES = [(shape, op, name) for shape in SHAPES for op in OPS for name in op.calls]


@pytest.mark.benchmark(timer=timing.synchronized_clock)
@pytest.mark.parametrize(
    ("shape", "op", "name"), parameters(case for case in CASES if wanted(*case))
)
def test_sinkhorn(measure: Any, shape: Shape, op: Op, name: str) -> None:
    measure(Inputs, shape, op, name)
