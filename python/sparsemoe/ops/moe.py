"""Routing tokens to experts.

Symbols: T tokens, H model width, E experts (at most 1024), k experts a token (at most 32), R rows,
F expert width. Reals are float32, bfloat16 or float16, and float64 on the CPU; sums are float32
(float64 for float64). Index tensors are int32. Every function works on the CPU and on CUDA, gives
the same bits on every run, never waits for the device, and raises RuntimeError (ValueError where
Python checks) with the argument's name when an argument does not fit.

    logits = router_linear(x, router_weight)
    weights, experts, logsumexp = gate(logits, top_k=2, renormalize=True)
    p = plan(experts, num_experts=logits.shape[1])
    y = combine(my_experts(dispatch(x, p), p.offsets), p, weights)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from ..types import ExpertChoice, Gate, Plan
from . import _moe_autograd, _router_linear  # noqa: F401  (register implementations)
from ._experts_autograd import ExpertsIntoSums

__all__ = [
    "ACTIVATIONS",
    "combine",
    "dispatch",
    "expert_choice",
    "experts",
    "gate",
    "grouped_mm",
    "load_balance_loss",
    "plan",
    "plan_from_tokens",
    "router_linear",
    "router_z_loss",
    "update_expert_bias_",
]

_ops = torch.ops.sparsemoe

# Name -> columns of the first projection for each column of the second.
ACTIVATIONS = {"swiglu": 2, "geglu": 2, "relu2": 1, "silu": 1, "gelu": 1}


def router_linear(x: Tensor, weight: Tensor) -> Tensor:
    """logits = x @ weight.T in float32, also under autocast (float64 where either is).

    On a GPU, for x in bfloat16, by the tensor cores: the weight (of 1e-30 or more) is the exact sum
    of three bfloat16 tensors, so that only the order of the sum differs from a product in float32.
    Gradients are sums of products whose factors are exact to 2^-16.

    Args:
        x: [T, H].
        weight: [E, H].

    Returns:
        [T, E], differentiable in both.
    """
    if x.device.type == "cpu" and not torch.is_autocast_enabled("cpu"):
        return _router_linear.plain(x, weight)
    return _ops.router_linear.default(x, weight)


def gate(
    logits: Tensor,
    top_k: int,
    *,
    scoring: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
) -> Gate:
    """Choose the k best experts of every token: scores, top-k, weights and log-sum-exp at once.

    Equal scores go to the lower expert. A NaN ranks below everything: the experts of a token are
    distinct and in range whatever its logits hold (its weights are then NaN).

    Args:
        logits: [T, E].
        top_k: experts a token, 1 to min(E, 32).
        scoring: "softmax" over all experts (Qwen3, OLMoE), "sigmoid" (DeepSeek-V3), or
            "softmax_after_topk" over the chosen ones (Mixtral).
        renormalize: divide the chosen weights by their sum (sigmoid: by their sum + 1e-20).
        scale: multiplies the weights.
        bias: [E], added to the scores for the choice only (loss-free balancing).
        n_group, topk_group: choose from the topk_group of n_group (at most 32) equal groups of
            experts whose two best scores sum highest (DeepSeek-V3).
        threshold: [E]; only scores at or above it can be chosen. With the moving average of
            `expert_choice(...).threshold` this is expert choice made causal (arXiv 2603.11535).
        mask: [T] bool; False: the token takes no expert.

    Returns:
        Gate(weights [T, k], experts [T, k], logsumexp [T]), best expert first. Where fewer than k
        can be chosen, the expert is -1 and the weight 0. Differentiable in `weights` and
        `logsumexp` to `logits`; the bias gets no gradient.
    """
    return Gate(
        *_ops.gate.default(
            logits,
            top_k,
            scoring,
            renormalize,
            scale,
            None if bias is None else bias.detach(),
            n_group,
            topk_group,
            threshold,
            mask,
        )
    )


def expert_choice(
    logits: Tensor, capacity: int, *, n_groups: int = 1, mask: Tensor | None = None
) -> ExpertChoice:
    """Let every expert take the `capacity` tokens of each group that score highest for it.

    The score is the softmax over experts. Zhou et al., arXiv 2202.09368. Choosing over a sequence
    looks at its later tokens: for a causal model see `threshold` of :func:`gate`.

    Args:
        logits: [T, E], the groups (sequences, say) one after another.
        capacity: tokens an expert takes of a group, 0 to T / n_groups.
        n_groups: divides T.
        mask: [T] bool; False: no expert takes the token.

    Returns:
        ExpertChoice(weights [E, N], tokens [E, N], threshold [n_groups, E]), N = n_groups *
        capacity, tokens ascending in each group. Differentiable in `weights`.
    """
    return ExpertChoice(*_ops.expert_choice.default(logits, capacity, n_groups, mask))


def plan(
    experts: Tensor,
    num_experts: int,
    *,
    capacity: int | None = None,
    drop_policy: str = "order",
    weights: Tensor | None = None,
) -> Plan:
    """Give every (token, expert) pair a row, sorted by expert and then by pair.

    Args:
        experts: [T, k] int32 from :func:`gate`; -1 is no expert. An index out of range is refused
            on the CPU and left without row on a GPU.
        num_experts: E.
        capacity: the rows that an expert keeps; None keeps all.
        drop_policy: which pairs an overfull expert keeps: "order", first choices before second
            choices and earlier tokens before later (GShard, Switch), or "weight", the heaviest.
        weights: [T, k], for "weight"; compared in float32.

    Returns:
        Plan with R = T*k rows, or min(T*k, E*capacity). Rows that no pair needs come last.
    """
    if drop_policy not in ("order", "weight"):
        raise ValueError(f"drop_policy must be 'order' or 'weight', got {drop_policy!r}")
    if drop_policy == "weight" and capacity is not None and weights is None:
        raise ValueError("weights must be given for drop_policy='weight', got None")
    by_weight = drop_policy == "weight" and capacity is not None and weights is not None
    keys = weights.detach().float() if by_weight and weights is not None else None
    offsets, counts, row_token, row_pair, token_rows = _ops.plan.default(
        experts, num_experts, capacity, keys
    )
    return Plan(offsets, counts, row_token, row_pair, token_rows, None)


def plan_from_tokens(tokens: Tensor, num_tokens: int) -> Plan:
    """The plan of experts that chose their own tokens: row e*N + i carries tokens[e, i].

    Args:
        tokens: [E, N] int32 from :func:`expert_choice`; -1 is none, and leaves a row of zeros. An
            index out of range is refused on the CPU and left without row on a GPU.
        num_tokens: T.

    Returns:
        Plan with R = E*N rows. Weights for :func:`combine` are [E, N], as the choice gave them.
    """
    return Plan(*_ops.plan_from_tokens.default(tokens, num_tokens))


def dispatch(x: Tensor, plan: Plan) -> Tensor:
    """Copy each token to its rows: x [T, H] -> rows [R, H]; a row without a token is zero."""
    return _ops.dispatch.default(
        x, plan.row_token, plan.row_pair, plan.token_rows, plan.token_offsets
    )


def combine(rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows by weight, in float32 and in the order of its choices.

    Args:
        rows: [R, H].
        plan: from :func:`plan` or :func:`plan_from_tokens`.
        weights: one a pair, shaped as the choice gave them; None: ones.

    Returns:
        y [T, H] of the rows' dtype; zero for a token without rows. Differentiable in both.
    """
    if weights is not None:
        weights = weights.to(torch.float64 if rows.dtype == torch.float64 else torch.float32)
    return _ops.combine.default(
        rows, weights, plan.row_token, plan.row_pair, plan.token_rows, plan.token_offsets
    )


def _autocast(*tensors: Any) -> Any:
    """The tensors as autocast wants a product's, float64 as it is; None stays None."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in tensors)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """y[r] = a[r] @ b[e] for the rows of expert e, offsets[e] <= r < offsets[e+1].

    For experts of one's own: `grouped_mm(rows, weight.mT, plan.offsets)` is a linear layer an
    expert with weight [E, out, in].

    Args:
        a: [R, K].
        b: [E, K, N] of a's dtype. Taken as it is where one of its last two dimensions is dense,
            else copied.
        offsets: [E+1] int32, ascending from 0 to at most R; others are refused on the CPU; on a
            GPU they are clamped, and rows between experts are then left as they are.

    Returns:
        [R, N], zero past the last offset. Sums are float32. Differentiable in a and b, twice. Under
        autocast both are cast to autocast's dtype.
    """
    a, b = _autocast(a, b)
    return _ops.grouped_mm.default(a, b, offsets)


def experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    plan: Plan,
    weights: Tensor | None = None,
    activation: str = "swiglu",
    *,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    recompute: bool = False,
    main_grads: tuple[Tensor | None, Tensor | None] | None = None,
) -> Tensor:
    """Send each token through its experts and sum their answers by weight, in float32.

        y[t] = sum over t's rows of weight * (down_proj[e] @ h + down_bias[e])
        h = activation(gate_up_proj[e] @ x[t] + gate_up_bias[e])

    Projections are read where they lie, in larger tensors and by column too ([E, H, 2F] seen
    through .mT); one with neither rows nor columns dense is copied. On a GPU few tokens are
    fastest with dense rows.

    Args:
        x: [T, H].
        gate_up_proj: [E, 2F, H], the gate's rows first; [E, F, H] for an activation without gate.
        down_proj: [E, H, F].
        plan: from :func:`plan` or :func:`plan_from_tokens`.
        weights: one a pair, shaped as the choice gave them; None: ones.
        activation: "swiglu", "geglu", "relu2", "silu" or "gelu".
        gate_up_bias: [E, 2F] or [E, F], added before the activation.
        down_bias: [E, H], added before the weighting.
        recompute: keep only x for the backward pass, not the R rows that the first projection
            gives: it runs again instead.
        main_grads: float32 sums [E, 2F, H] and [E, H, F], contiguous, either of them None. The
            backward pass adds the projection's gradient to its sum, and autograd gets none
            (Megatron's main_grad).

    Returns:
        y [T, H]. Differentiable in x, the projections, the biases and the weights. Under autocast
        all but the weights are cast to autocast's dtype.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    reals = _autocast(x, gate_up_proj, down_proj, gate_up_bias, down_bias)
    if weights is not None:
        weights = weights.to(torch.float64 if reals[0].dtype == torch.float64 else torch.float32)
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (*reals, weights)
    )
    inputs = (
        *reals,
        weights,
        plan.offsets,
        plan.row_token,
        plan.row_pair,
        plan.token_rows,
        plan.token_offsets,
        activation,
        differentiable and not recompute,
    )
    if main_grads is None:
        return _ops.experts.default(*inputs)[0]
    for index, (total, of) in enumerate(zip(main_grads, (gate_up_proj, down_proj), strict=True)):
        if total is not None and (
            total.dtype != torch.float32
            or total.shape != of.shape
            or total.device != of.device
            or not total.is_contiguous()
        ):
            raise ValueError(
                f"main_grads[{index}] must be a contiguous float32 tensor of shape"
                f" {list(of.shape)} on {of.device}, got {total.dtype} {list(total.shape)} with"
                f" strides {total.stride()} on {total.device}"
            )
    return ExpertsIntoSums.apply(main_grads, *inputs)


def load_balance_loss(logits: Tensor, counts: Tensor, mask: Tensor | None = None) -> Tensor:
    """E * sum_e f_e * p_e: f_e the fraction of the pairs that asked for expert e, p_e its mean
    softmax probability over the tokens. 1 for perfect balance. Switch Transformers, arXiv
    2101.03961, eq. 4.

    Args:
        logits: [T, E]; the loss is differentiable in them, through p.
        counts: [E] int32, `Plan.counts`.
        mask: [T] bool; False: the token is left out.

    Returns:
        A scalar.
    """
    return _ops.load_balance_loss.default(logits, counts, mask)


def router_z_loss(logsumexp: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean(logsumexp^2) over the tokens that the mask keeps, which holds logits small. ST-MoE,
    arXiv 2202.08906, eq. 5.

    Args:
        logsumexp: [T], `Gate.logsumexp`.
        mask: [T] bool.

    Returns:
        A scalar.
    """
    return _ops.router_z_loss.default(logsumexp, mask)


def update_expert_bias_(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """bias += rate * sign(mean load - load), in place. Loss-free balancing, arXiv 2408.15664.

    Args:
        bias: [E] float32, the `bias` of :func:`gate`.
        counts: [E] int32, `Plan.counts` of the step.
        rate: 0.001 in DeepSeek-V3.

    Returns:
        bias.
    """
    with torch.no_grad():
        _ops.update_expert_bias_.default(bias, counts, rate)
    return bias
