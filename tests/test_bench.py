"""The benchmarks still run, and their implementations agree, at a size that takes no time."""

import functools

import pytest
import torch

from bench import peers
from bench.bench_moe import OPS
from bench.case import difference
from bench.inputs_moe import Inputs, Shape

SHAPE = Shape("tiny", 96, 64, 32, 8, 2, torch.float32)
CASES = [
    pytest.param(op, name, id=f"{op.name}-{name}")
    for op in OPS
    for name in op.calls
    if name not in peers.KNOWN and name not in ("reference", "torch-compiled")
]


@functools.cache
def inputs() -> Inputs:
    return Inputs(SHAPE)


@pytest.mark.parametrize(("op", "name"), CASES)
@torch.no_grad()
def test_implementations_agree(op, name):
    result, expected = (
        list(op.view(inputs(), op.calls[which](inputs())())) for which in (name, "reference")
    )
    assert difference(op, SHAPE, result, expected) is None
    assert op.nbytes(SHAPE) > 0
