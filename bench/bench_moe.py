"""Routing tokens to experts: each op beside its reference, plain PyTorch and the peers."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import Tensor

from bench import inputs_moe, peers, plain_moe, timing
from bench.case import Op, backward, beside, call, forward_backward, parameters, plain
from bench.inputs import GPU
from bench.inputs_moe import Inputs, Shape
from sparsemoe.ops import moe as ops
from sparsemoe.reference import moe as reference
from sparsemoe.types import Plan

GPU_SHAPES = [inputs_moe.QWEN3, inputs_moe.OLMOE, inputs_moe.DECODE[-1]]
SHAPES = GPU_SHAPES if GPU else inputs_moe.CPU

ours = partial(beside, {"sparsemoe": ops, "reference": reference})


def gate_and_plan(module: Any, logits: Tensor, top_k: int, **options: Any) -> Plan:
    return module.plan(module.gate(logits, top_k, **options)[1], logits.shape[1])


def plan_and_dispatch(module: Any, x: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    return module.dispatch(x, module.plan(experts, num_experts))


CAPPED = "experts num_experts capacity=capacity"
MOVE_BACK = "rows_gradient long_plan"
COMBINE = "rows long_plan weights"

gate = {
    **ours("gate", "logits top_k", renormalize=True),
    **plain(plain_moe.gate, "logits top_k"),
    "torch, softmax first": call(plain_moe.gate_softmax_first, "logits top_k"),
    "moe-ops": call(peers.gate, "logits top_k"),
}
expert_choice = {
    **ours("expert_choice", "logits group_capacity n_groups=groups"),
    **plain(plain_moe.expert_choice, "logits group_capacity groups"),
}
plan = {
    **ours("plan", "experts num_experts"),
    **plain(plain_moe.plan, "experts num_experts"),
    "torch, bincount": call(plain_moe.plan_bincount, "experts num_experts"),
}
plan_by_order = {**ours("plan", CAPPED), **plain(plain_moe.plan_capped, CAPPED)}
plan_by_weight = {
    **ours("plan", f"{CAPPED} weights=weights", drop_policy="weight"),
    **plain(plain_moe.plan_capped, f"{CAPPED} weights=weights"),
}
gate_plan = {
    **ours(gate_and_plan, "logits top_k", renormalize=True),
    **plain(partial(gate_and_plan, plain_moe), "logits top_k"),
}
dispatch = {
    **ours("dispatch", "x plan"),
    **plain(plain_moe.dispatch, "x long_plan"),
}
plan_dispatch = {
    **ours(plan_and_dispatch, "x experts num_experts"),
    **plain(partial(plan_and_dispatch, plain_moe), "x experts num_experts"),
    "moe-ops": call(peers.dispatch, "x experts num_experts"),
}
dispatch_backward = {
    # combine without weights is dispatch's gradient; called without autograd, as the others are
    **ours("combine", "rows_gradient plan"),
    **plain(plain_moe.combine, MOVE_BACK),
    "torch, index_add": call(plain_moe.combine_index_add, MOVE_BACK),
    "torch, embedding_bag": call(plain_moe.combine_embedding_bag, MOVE_BACK),
    "moe-ops": call(peers.dispatch_backward, "rows_gradient pair_rows tokens top_k"),
}
combine = {
    **ours("combine", "rows plan weights"),
    **plain(plain_moe.combine, COMBINE),
    "torch, index_add": call(plain_moe.combine_index_add, COMBINE),
    "torch, bmm": call(plain_moe.combine_bmm, COMBINE),
    "torch, embedding_bag": call(plain_moe.combine_embedding_bag, COMBINE),
    "moe-ops": call(peers.combine, "rows pair_rows weights"),
}
combine_backward = {
    **backward(ours("combine", "rows plan weights"), "rows weights"),
    **plain(plain_moe.combine_backward, f"y_gradient {COMBINE}"),
    "moe-ops": call(peers.combine_backward, "y_gradient rows pair_rows weights"),
}
load_balance = {
    **ours("load_balance_loss", "logits counts"),
    **plain(plain_moe.load_balance_loss, "logits counts"),
}


def gate_bytes(inputs: Inputs) -> float:
    s = inputs.shape
    return 4 * s.tokens * s.experts + 8 * s.pairs + 4 * s.tokens


def plan_bytes(inputs: Inputs) -> float:
    return 16 * inputs.shape.pairs + 8 * inputs.shape.experts


def move_bytes(inputs: Inputs, rows_moved: int = 1) -> float:
    s = inputs.shape
    return (rows_moved * s.pairs + s.tokens) * s.hidden * s.dtype.itemsize


def logits_bytes(inputs: Inputs) -> float:
    return 4 * inputs.shape.tokens * inputs.shape.experts


def choice_view(inputs: Inputs, result: Any) -> list[Tensor]:
    return [result[0].sort(-1).values, result[1].sort(-1).values]  # in any order


def capped_view(inputs: Inputs, plan: Plan) -> list[Tensor]:
    return [plan.offsets, plan.counts, plan.token_rows >= 0]  # rows of an expert in any order


def rows_view(inputs: Inputs, result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result[inputs.plan.token_rows]]
    rows, pair_rows, _ = result
    return [rows[pair_rows.view(inputs.top_k, -1).T]]


OPS = [
    Op(
        "gate",
        gate,
        "reads logits, writes k weights and k experts a token and the log-sum-exp",
        gate_bytes,
        view=lambda inputs, result: result[:2],  # not everyone returns the log-sum-exp
        ties=1e-3,
        tolerance=1e-4,
    ),
    Op(
        "gate, forward + backward",
        forward_backward(gate, "logits"),
        "the forward pass's; reads k weights, gradients and experts a token, writes d logits",
        lambda inputs: gate_bytes(inputs) + 12 * inputs.shape.pairs + logits_bytes(inputs),
        tolerance=1e-3,  # ties again
    ),
    Op(
        "expert_choice",
        expert_choice,
        "reads logits, writes weights and tokens",
        lambda inputs: logits_bytes(inputs) + 8 * inputs.shape.pairs,
        view=choice_view,
        ties=1e-3,
    ),
    Op("plan", plan, "reads experts, writes row_token, row_pair, token_rows", plan_bytes),
    Op(
        "plan, capacity by order",
        plan_by_order,
        "as plan",
        plan_bytes,
        view=capped_view,
    ),
    Op(
        "plan, capacity by weight",
        plan_by_weight,
        "as plan; reads weights",
        lambda inputs: plan_bytes(inputs) + 4 * inputs.shape.pairs,
        view=capped_view,
        ties=1e-3,
    ),
    Op(
        "gate + plan",
        gate_plan,
        "both",
        lambda inputs: gate_bytes(inputs) + plan_bytes(inputs),
        view=lambda inputs, plan: [plan.offsets.float()],  # ties again
    ),
    Op("dispatch", dispatch, "reads x once, writes k rows a token", move_bytes, view=rows_view),
    Op(
        "plan + dispatch",
        plan_dispatch,
        "both",
        lambda inputs: plan_bytes(inputs) + move_bytes(inputs),
        view=rows_view,
    ),
    Op("dispatch, backward", dispatch_backward, "reads k rows a token, writes one", move_bytes),
    Op("combine", combine, "reads k rows a token, writes one", move_bytes),
    Op(
        "combine, backward",
        combine_backward,
        "reads k rows and one row of d y a token, writes k rows",
        lambda inputs: move_bytes(inputs, rows_moved=2),
    ),
    Op(
        "load_balance_loss, forward + backward",
        forward_backward(load_balance, "logits"),
        "reads logits twice, writes d logits",
        lambda inputs: 3 * logits_bytes(inputs),
    ),
]


def selected() -> list[Any]:
    """Compiled expressions on the first shape only, since each compilation takes seconds; training
    on a decode shape not at all."""
    return parameters(
        (shape, op, name)
        for shape in SHAPES
        for op in OPS
        for name in op.calls
        if not ("decode" in shape.name and "backward" in op.name)
        and not (name == "torch-compiled" and shape is not SHAPES[0])
    )


@pytest.mark.benchmark(timer=timing.synchronized_clock)
@pytest.mark.parametrize(("shape", "op", "name"), selected())
def test_moe(measure: Any, shape: Shape, op: Op, name: str) -> None:
    measure(Inputs, shape, op, name)
