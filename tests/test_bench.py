"""The benchmarks still run, and their implementations agree, at a size that takes no time."""

import functools
from dataclasses import replace

import pytest
import torch

from bench import (
    bench_experts,
    bench_moe,
    bench_rvq,
    bench_sinkhorn,
    case,
    inputs_moe,
    inputs_rvq,
    inputs_sinkhorn,
    peers,
    timing,
)
from bench.bench_experts import GPU_SHAPES
from bench.inputs import GPU

SHAPE = inputs_moe.Shape("tiny", 96, 64, 32, 8, 2, torch.float32)
RVQ_SHAPE = inputs_rvq.Shape("tiny", 96, 16, 24, 3, beam_vectors=32)
SINKHORN_SHAPE = inputs_sinkhorn.Shape("tiny", 1, 70, 12, 20)
# torch's grouped_mm of float32 waits for the device, so that it cannot be captured
GRAPH_SHAPE = replace(SHAPE, dtype=torch.bfloat16)
CASES = [
    pytest.param(
        make, graph_shape if "graph" in op.name else shape, op, name, id=f"{op.name}-{name}"
    )
    for make, shape, graph_shape, ops in [
        (inputs_moe.Inputs, SHAPE, GRAPH_SHAPE, bench_moe.OPS + bench_experts.OPS),
        (inputs_rvq.Inputs, RVQ_SHAPE, RVQ_SHAPE, bench_rvq.OPS),
        (inputs_sinkhorn.Inputs, SINKHORN_SHAPE, SINKHORN_SHAPE, bench_sinkhorn.OPS),
    ]
    for op in ops
    for name in op.calls
    if name not in peers.KNOWN and name not in ("reference", "torch-compiled")
    if GPU or not ("graph" in op.name or "bf16" in name)
]


@functools.cache
def inputs(make, shape):
    return make(shape)


@pytest.mark.parametrize(("make", "shape", "op", "name"), CASES)
@torch.no_grad()
def test_implementations_agree(make, shape, op, name):
    given = inputs(make, shape)
    result, expected = (
        list(op.view(given, op.calls[which](given)())) for which in (name, "reference")
    )
    assert case.difference(op, shape, result, expected, name) is None
    assert op.nbytes(given) > 0


@pytest.mark.parametrize("shape", GPU_SHAPES, ids=lambda s: s.name)
def test_every_layer_meets_the_peers(shape):
    for suffix in ("",) if "decode" in shape.name else ("", ", forward + backward"):
        beside = {
            name
            for op in bench_experts.OPS
            if op.name in ("layer" + suffix, "layer with router" + suffix)
            for name in op.calls
            if bench_experts.wanted(shape, op, name)
        }
        assert beside >= {"sparsemoe", "torch", "moe-ops", "liger", "sonic-moe"}


@pytest.mark.parametrize("op", bench_rvq.OPS, ids=lambda op: op.name)
@torch.no_grad()
def test_vectors_that_are_quantized_otherwise_are_noticed(op):
    """Codes of a neighbour, or a gradient or state that is not moved."""
    given = inputs(inputs_rvq.Inputs, RVQ_SHAPE)
    expected = list(op.view(given, op.calls["reference"](given)()))
    wrong = [t.roll(1, 0) for t in expected]
    for index, t in enumerate(wrong):
        result = [*expected[:index], t, *expected[index + 1 :]]
        assert case.difference(op, RVQ_SHAPE, result, expected) is not None


def test_a_replay_starts_from_the_first_state():
    given = inputs(inputs_rvq.Inputs, RVQ_SHAPE)
    with torch.no_grad():
        call = bench_rvq.training_step["torch"](given)
        call()
        assert not torch.equal(call.state[0], given.state[0])
        call.reset()
    assert all(torch.equal(a, b) for a, b in zip(call.state, given.state, strict=True))


def test_compilers_share_candidates():
    def tuner(*of):
        def suitable(self, sizes):
            return [c for c in range(sizes) if c % 2 == 0]

        shared = type("Autotuner", (), {"prune_configs": suitable})
        peers.share_candidates(shared, *of)
        return shared()

    assert tuner(0, 1).prune_configs(9) == [0, 2, 4, 6, 8]
    shares = [tuner(index, 4).prune_configs(9) for index in range(4)]
    assert sorted(c for share in shares for c in share) == [0, 2, 4, 6, 8]
    assert all(tuner(index, 4).prune_configs(3) for index in range(4))


def test_differences():
    op = bench_experts.OPS[0]
    b = torch.arange(20.0)[:, None] + 1
    assert case.difference(op, SHAPE, [b * 1.00005, b[0, 0]], [b, b[0, 0]]) is None
    assert case.difference(op, SHAPE, [b * 1.01], [b]) == "output 0 is wrong by 0.01"
    assert case.difference(op, SHAPE, [b[:3]], [b]) == ("output 0 has shape (3, 1) and not (20, 1)")
    assert case.difference(op, SHAPE, [b * torch.nan], [b]) == "output 0 is wrong by nan"
    integers = torch.arange(5)
    assert case.difference(op, SHAPE, [integers], [integers.flip(0)]) == "output 0 is wrong by 0.8"
    rough = replace(op, rough={"peer": 0.1})
    assert case.difference(rough, SHAPE, [b * 1.01], [b], "peer") is None
    assert case.difference(rough, SHAPE, [b * 1.01], [b], "other") is not None


def test_calls_that_fail_drop_out_of_the_turns(monkeypatch):
    monkeypatch.setattr(timing, "DEVICE", torch.device("cpu"))
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


@pytest.mark.skipif(not GPU, reason="needs a GPU")
def test_turns_on_a_gpu():
    x = torch.ones(4096, 4096, device="cuda")
    builders = {"once": lambda: lambda: x + x, "often": lambda: lambda: [x + x for _ in range(20)]}
    builders["broken"] = lambda: lambda: x + x.cpu()
    found = timing.in_turns(builders, seconds=0)
    assert found.keys() == {"once", "often"}
    assert 5 * found["once"] < found["often"] < 100 * found["once"]
