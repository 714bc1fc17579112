"""The benchmarks still run, and their implementations agree, at a size that takes no time."""

import functools

import pytest
import torch

from bench import peers, timing
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


def test_calls_that_fail_drop_out_of_the_turns():
    log = []

    def call(name, fails_at=None):
        def once():
            log.append(name)
            if log.count(name) == fails_at:
                raise RuntimeError

        return once

    def broken():
        raise RuntimeError

    builders = {
        "a": lambda: call("a"),
        "broken": broken,
        "at once": lambda: call("at once", 1),
        "later": lambda: call("later", 6),
        "b": lambda: call("b"),
    }
    assert timing.in_turns(builders, seconds=0).keys() == {"a", "b"}
    assert log.count("a") == log.count("b") == 3 + 5 * 3
    assert log[-6:] == ["a"] * 3 + ["b"] * 3
