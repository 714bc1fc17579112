"""Layers of experts: gather, two matrix products an expert, weighted sum, beside plain PyTorch and
the peers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from bench import inputs_moe, peers, plain_moe, timing
from bench.case import (
    Op,
    Table,
    beside,
    call,
    captured,
    forward_backward,
    parameters,
    plain,
    tensors,
)
from bench.inputs import GPU
from bench.inputs_moe import OLMOE, QWEN3, Inputs, Shape
from sparsemoe.ops import moe as ops
from sparsemoe.reference import moe as reference

GPU_SHAPES = [QWEN3, OLMOE, *inputs_moe.OTHERS, *inputs_moe.SKEWED, *inputs_moe.DECODE]
SHAPES = GPU_SHAPES if GPU else inputs_moe.CPU

ours = partial(beside, {"sparsemoe": ops, "reference": reference})


def layer(module: Any, x, gate_up_proj, down_proj, experts, weights, **options: Any) -> Tensor:
    plan = module.plan(experts, len(gate_up_proj))
    return module.experts(x, gate_up_proj, down_proj, plan, weights, **options)


def routed(module: Any, x, router, gate_up_proj, down_proj, top_k: int, **options: Any) -> Tensor:
    weights, experts, *_ = module.gate(module.router_linear(x, router), top_k, **options)
    return layer(module, x, gate_up_proj, down_proj, experts, weights)


def stack(module: Any, x, layers, plan, weights) -> Tensor:
    for gate_up_proj, down_proj in layers:
        x = module.experts(x, gate_up_proj, down_proj, plan, weights)
    return x


def up(module: Any, rows: Tensor, gate_up_proj: Tensor, plan: Any, mm: str = "grouped_mm") -> Any:
    return getattr(module, mm)(rows, gate_up_proj.mT, plan.offsets)


LAYER = "x gate_up_proj down_proj experts weights"
LEAVES = "x gate_up_proj down_proj weights"
BY_COLUMN = "x gate_up_by_column down_by_column experts weights"
BY_COLUMN_LEAVES = "x gate_up_by_column down_by_column weights"
ROUTED = "x low_router gate_up_proj down_proj top_k"
ROUTED_LEAVES = "x low_router gate_up_proj down_proj"
SONIC = "x low_router interleaved_proj down_proj"
SONIC_LAYER = "x interleaved_proj down_proj pair_tokens experts weights"
SONIC_LEAVES = "x interleaved_proj down_proj weights"

torch_layer = partial(layer, plain_moe)
whole_layer = {
    **ours(layer, LAYER),
    **plain(torch_layer, LAYER),
    "torch, grouped_mm": call(torch_layer, LAYER, mm=plain_moe.grouped_mm),
    "torch, index_add": call(torch_layer, LAYER, sum_rows=plain_moe.combine_index_add),
    "torch, bmm": call(torch_layer, LAYER, sum_rows=plain_moe.combine_bmm),
    "moe-ops": call(peers.moe_ops_layer, LAYER),
    "liger": call(peers.liger_layer, LAYER),
    "scattermoe": call(peers.scattermoe_layer, LAYER),
}
layer_by_column = {**ours(layer, BY_COLUMN), "torch": call(torch_layer, BY_COLUMN)}
routed_layer = {
    **ours(routed, ROUTED, renormalize=True),
    "torch": call(partial(routed, plain_moe), ROUTED),
}
router_linear = {
    **ours("router_linear", "x router"),
    "torch": call(plain_moe.router_linear, "x router"),
}
sonic = {"sonic-moe": call(peers.sonic_routed, f"{SONIC} top_k")}
sonic_layer = {"sonic-moe": call(peers.sonic_layer, SONIC_LAYER)}
grouped_mm = {
    **ours(up, "rows gate_up_proj plan"),
    "torch": call(partial(up, plain_moe, mm="products"), "rows gate_up_proj long_plan"),
    "torch, grouped_mm": call(partial(up, plain_moe), "rows gate_up_proj long_plan"),
}
# the others wait for the device, so that they cannot be captured
CAPTURED = ("sparsemoe", "torch", "torch, bmm", "moe-ops")
replayed = captured({name: whole_layer[name] for name in CAPTURED})
replayed["reference"] = whole_layer["reference"]
eight_layers = {
    **ours(stack, "x layers plan weights"),
    "torch": call(partial(stack, plain_moe), "x layers long_plan weights"),
}
eight_replayed = {**captured(eight_layers), "reference": eight_layers["reference"]}


def layer_bytes(inputs: Inputs) -> float:
    s = inputs.shape
    weights = 3 * inputs.touched * s.width * s.hidden
    return (2 * s.tokens * s.hidden + weights) * s.dtype.itemsize


def layer_flops(inputs: Inputs) -> float:
    s = inputs.shape
    return 6 * s.pairs * s.width * s.hidden


def routed_flops(inputs: Inputs) -> float:
    s = inputs.shape
    return layer_flops(inputs) + 2 * s.tokens * s.experts * s.hidden


def router_bytes(inputs: Inputs) -> float:
    s = inputs.shape
    return s.tokens * s.hidden * s.dtype.itemsize + 4 * (s.tokens + s.hidden) * s.experts


def mm_bytes(inputs: Inputs) -> float:
    s = inputs.shape
    rows = s.pairs * (s.hidden + 2 * s.width)
    return (rows + 2 * inputs.touched * s.width * s.hidden) * s.dtype.itemsize


def mm_flops(inputs: Inputs) -> float:
    s = inputs.shape
    return 4 * s.pairs * s.width * s.hidden


def gradients_view(inputs: Inputs, result: Any) -> list[Tensor]:
    """That of interleaved_proj laid out as the others'."""
    return [t.transpose(1, 2).flatten(1, 2) if t.dim() == 4 else t for t in tensors(result)]


def with_backward(op: Op, calls: Table, counts: str, **changes: Any) -> list[Op]:
    """op, and the same with its backward pass, which moves and computes three times as much."""
    both = replace(
        op,
        name=f"{op.name}, forward + backward",
        calls=calls,
        counts=counts,
        nbytes=lambda inputs: 3 * op.nbytes(inputs),
        flops=lambda inputs: 3 * op.flops(inputs),
        **changes,
    )
    return [op, both]


OPS = [
    *with_backward(
        Op(
            "layer",
            whole_layer | sonic_layer,
            "6 T k F H operations; reads x and the weights of experts that take a row, writes y",
            layer_bytes,
            layer_flops,
        ),
        forward_backward(whole_layer, LEAVES) | forward_backward(sonic_layer, SONIC_LEAVES),
        "18 T k F H operations; three times the forward pass's bytes",
        view=gradients_view,
    ),
    Op(
        "layer, CUDA graph",
        replayed,
        "as layer, which is replayed from a CUDA graph",
        layer_bytes,
        layer_flops,
    ),
    Op(
        "8 layers, CUDA graph",
        eight_replayed,
        "eight times layer, one after the other, with weights of their own and a plan made before",
        lambda inputs: 8 * layer_bytes(inputs),
        lambda inputs: 8 * layer_flops(inputs),
    ),
    *with_backward(
        Op("layer, weights by column", layer_by_column, "as layer", layer_bytes, layer_flops),
        forward_backward(layer_by_column, BY_COLUMN_LEAVES),
        "as layer, forward + backward",
    ),
    *with_backward(
        Op(
            "layer with router",
            routed_layer | sonic,
            "as layer, and 2 T E H operations",
            layer_bytes,
            routed_flops,
            # Logits of bfloat16 choose other experts for some tokens: of few, one is much.
            rough={"sonic-moe": 0.3},
        ),
        forward_backward(routed_layer, ROUTED_LEAVES) | forward_backward(sonic, SONIC),
        "as layer, and 6 T E H operations",
        view=gradients_view,
    ),
    *with_backward(
        Op(
            "router_linear",
            router_linear,
            "2 T E H operations; reads x, writes logits",
            router_bytes,
            lambda inputs: routed_flops(inputs) - layer_flops(inputs),
            tolerance=1e-4,
        ),
        forward_backward(router_linear, "x router"),
        "6 T E H operations; three times the forward pass's bytes",
        tolerance=None,
    ),
    *with_backward(
        Op(
            "grouped_mm",
            grouped_mm,
            "4 T k F H operations; reads rows of H and the weights, writes rows of 2 F",
            mm_bytes,
            mm_flops,
        ),
        forward_backward(grouped_mm, "rows gate_up_proj"),
        "12 T k F H operations; three times the forward pass's bytes",
    ),
]


def wanted(shape: Shape, op: Op, name: str) -> bool:
    """What is worth its time. What tunes itself or compiles for long meets one or two shapes."""
    decode = "decode" in shape.name
    if decode and (op.name in ("grouped_mm", "router_linear") or "backward" in op.name):
        return False
    if "graph" in op.name:
        return decode and name != "reference"
    if shape.skewed and op.name not in ("layer", "layer, forward + backward"):
        return False
    if "by column" in op.name and shape not in SHAPES[:2]:
        return False
    if name == "torch, grouped_mm":
        return not GPU  # there it is "torch"
    if name in ("reference", "torch-compiled"):  # slow, and slow to compile
        return shape is SHAPES[0]
    if name == "sonic-moe":
        return "router" in op.name or shape.skewed  # with a router, by its own choice
    return shape in SHAPES[:2] or name not in ("torch, index_add", "scattermoe")


CASES = [(shape, op, name) for shape in SHAPES for op in OPS for name in op.calls]


@pytest.mark.benchmark(timer=timing.synchronized_clock)
@pytest.mark.parametrize(
    ("shape", "op", "name"), parameters(case for case in CASES if wanted(*case))
)
def test_experts(measure: Any, shape: Shape, op: Op, name: str) -> None:
    measure(Inputs, shape, op, name)
