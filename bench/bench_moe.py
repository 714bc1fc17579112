"""Mixture of experts: each operation beside its reference, plain PyTorch and the peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from bench import peers, plain_moe, timing
from bench.case import Op, Table, backward, call, forward_backward, plain
from bench.inputs_moe import SHAPES, Inputs, Shape
from sparsemoe.ops import moe as ops
from sparsemoe.reference import moe as reference
from sparsemoe.types import Plan


def ours(function: str | Callable[..., Any], names: str, **options: Any) -> Table:
    """The op of that name, or a function whose first argument is the module of ops."""

    def of(module: Any) -> Any:
        if isinstance(function, str):
            return getattr(module, function)
        return partial(function, module)

    modules = {"sparsemoe": ops, "reference": reference}
    return {name: call(of(module), names, **options) for name, module in modules.items()}


def gate_and_plan(module: Any, logits: Tensor, top_k: int, **options: Any) -> Plan:
    return module.plan(module.gate(logits, top_k, **options)[1], logits.shape[1])


def plan_and_dispatch(module: Any, x: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    return module.dispatch(x, module.plan(experts, num_experts))


def layer(module: Any, x, gate_up_proj, down_proj, experts, weights, **options: Any) -> Tensor:
    plan = module.plan(experts, len(gate_up_proj))
    return module.experts(x, gate_up_proj, down_proj, plan, weights, **options)


def routed(module: Any, x, router, gate_up_proj, down_proj, top_k: int, **options: Any) -> Tensor:
    weights, experts, *_ = module.gate(F.linear(x.float(), router), top_k, **options)
    return layer(module, x, gate_up_proj, down_proj, experts, weights)


CAPPED = "experts num_experts capacity=capacity"
MOVE_BACK = "rows_gradient long_plan"
COMBINE = "rows long_plan weights"
LAYER = "x gate_up_proj down_proj experts weights"
ROUTED = "x router gate_up_proj down_proj top_k"

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
torch_layer = partial(layer, plain_moe)
whole_layer = {
    **ours(layer, LAYER),
    **plain(torch_layer, LAYER),
    "torch, grouped_mm": call(torch_layer, LAYER, linear=plain_moe.grouped_linear),
    "torch, index_add": call(torch_layer, LAYER, sum_rows=plain_moe.combine_index_add),
    "torch, bmm": call(torch_layer, LAYER, sum_rows=plain_moe.combine_bmm),
    "moe-ops": call(peers.moe_ops_layer, LAYER),
    "liger": call(peers.liger_layer, LAYER),
}
routed_layer = {
    **ours(routed, ROUTED, renormalize=True),
    "torch": call(partial(routed, plain_moe), ROUTED),
}


def gate_bytes(s: Shape) -> float:
    return 4 * s.tokens * s.experts + 8 * s.pairs + 4 * s.tokens


def plan_bytes(s: Shape) -> float:
    return 16 * s.pairs + 8 * s.experts


def move_bytes(s: Shape, rows_moved: int = 1) -> float:
    return (rows_moved * s.pairs + s.tokens) * s.hidden * s.dtype.itemsize


def layer_bytes(s: Shape) -> float:
    return (2 * s.tokens * s.hidden + 3 * s.experts * s.width * s.hidden) * s.dtype.itemsize


def layer_flops(s: Shape) -> float:
    return 6 * s.pairs * s.width * s.hidden


def routed_flops(s: Shape) -> float:
    return layer_flops(s) + 2 * s.tokens * s.experts * s.hidden


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
        ties=True,
        tolerance=1e-4,
    ),
    Op(
        "gate, forward + backward",
        forward_backward(gate, "logits"),
        "the forward pass's; reads k weights, gradients and experts a token, writes d logits",
        lambda s: gate_bytes(s) + 12 * s.pairs + 4 * s.tokens * s.experts,
        tolerance=1e-3,  # ties again
    ),
    Op(
        "expert_choice",
        expert_choice,
        "reads logits, writes weights and tokens",
        lambda s: 4 * s.tokens * s.experts + 8 * s.pairs,
        view=choice_view,
        ties=True,
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
        lambda s: plan_bytes(s) + 4 * s.pairs,
        view=capped_view,
        ties=True,
    ),
    Op(
        "gate + plan",
        gate_plan,
        "both",
        lambda s: gate_bytes(s) + plan_bytes(s),
        view=lambda inputs, plan: [plan.offsets.float()],  # ties again
    ),
    Op("dispatch", dispatch, "reads x once, writes k rows a token", move_bytes, view=rows_view),
    Op(
        "plan + dispatch",
        plan_dispatch,
        "both",
        lambda s: plan_bytes(s) + move_bytes(s),
        view=rows_view,
    ),
    Op("dispatch, backward", dispatch_backward, "reads k rows a token, writes one", move_bytes),
    Op("combine", combine, "reads k rows a token, writes one", move_bytes),
    Op(
        "combine, backward",
        combine_backward,
        "reads k rows and one row of d y a token, writes k rows",
        lambda s: move_bytes(s, rows_moved=2),
    ),
    Op(
        "load_balance_loss, forward + backward",
        forward_backward(load_balance, "logits"),
        "reads logits twice, writes d logits",
        lambda s: 12 * s.tokens * s.experts,
    ),
    Op(
        "layer",
        whole_layer,
        "6 T k F H operations; reads x and the experts' weights, writes y",
        layer_bytes,
        layer_flops,
    ),
    Op(
        "layer, forward + backward",
        forward_backward(whole_layer, "x gate_up_proj down_proj weights"),
        "18 T k F H operations; three times the forward pass's bytes",
        lambda s: 3 * layer_bytes(s),
        lambda s: 3 * layer_flops(s),
    ),
    Op(
        "layer with router",
        routed_layer,
        "as layer, and 2 T E H operations",
        layer_bytes,
        routed_flops,
    ),
    Op(
        "layer with router, forward + backward",
        forward_backward(routed_layer, "x router gate_up_proj down_proj"),
        "as layer, and 6 T E H operations",
        lambda s: 3 * layer_bytes(s),
        lambda s: 3 * routed_flops(s),
    ),
]


def selected() -> list[Any]:
    """Compiled expressions on the first shape only, since each compilation takes seconds; training
    on a decode shape not at all; peers last, so that one that breaks the GPU spoils the least."""
    chosen = [
        (shape, op, name)
        for shape in SHAPES
        for op in OPS
        for name in op.calls
        if not ("decode" in shape.name and "backward" in op.name)
        and not (name == "torch-compiled" and shape is not SHAPES[0])
        and not (name == "torch, grouped_mm" and timing.DEVICE.type == "cuda")  # that is "torch"
        and not (name in peers.KNOWN and name not in peers.INSTALLED)
    ]
    chosen.sort(key=lambda case: case[2] in peers.KNOWN)
    return [
        pytest.param(*case, id="-".join((case[0].name, case[1].name, case[2]))) for case in chosen
    ]


@pytest.mark.benchmark(timer=timing.synchronized_clock)
@pytest.mark.parametrize(("shape", "op", "name"), selected())
def test_moe(measure: Any, shape: Shape, op: Op, name: str) -> None:
    measure(Inputs, shape, op, name)
