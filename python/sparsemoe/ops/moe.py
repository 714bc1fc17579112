"""Routing tokens to experts.

Symbols: T tokens, H model width, E experts (at most 1024), k experts a token (at most 32), R rows,
F expert width. Reals are float32, bfloat16 or float16, and float64 on the CPU; sums are float32
(float64 for float64). Index tensors are int32. Every function works on the CPU and on CUDA, gives
the same bits on every run, never waits for the device (but where it says so), and raises
RuntimeError with the argument's name when an argument does not fit.

    logits = x @ router_weight.T
    weights, experts, logsumexp = gate(logits, top_k=2, renormalize=True)
    p = plan(experts, num_experts=logits.shape[1])
    y = combine(my_experts(dispatch(x, p), p.offsets), p, weights)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _library  # noqa: F401  (loads the operators)
from ..reference.moe import activate
from ..types import ExpertChoice, Gate, Plan
from . import _grouped_linear, _moe_autograd  # noqa: F401  (register implementations)

__all__ = [
    "ACTIVATIONS",
    "combine",
    "dispatch",
    "expert_choice",
    "experts",
    "gate",
    "grouped_linear",
    "load_balance_loss",
    "plan",
    "plan_from_tokens",
    "router_z_loss",
    "update_expert_bias_",
]

_ops = torch.ops.sparsemoe

# Name -> columns of the first projection for each column of the second.
ACTIVATIONS = {"swiglu": 2, "geglu": 2, "relu2": 1, "silu": 1, "gelu": 1}


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


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y[r] = weight[e] @ x[r] for the rows of expert e, offsets[e] <= r < offsets[e+1].

    One launch without host sync in bfloat16 on compute capability 9.0 or later (sizes in
    multiples of 8); elsewhere one matrix product an expert, on a GPU with a host sync.

    Args:
        x: [R, K].
        weight: [E, N, K] of x's dtype.
        offsets: [E+1] int32. What rows past the last offset become is not specified.

    Returns:
        [R, N]. Differentiable in x and weight.
    """
    return _ops.grouped_linear.default(x, weight, offsets)


def experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    plan: Plan,
    weights: Tensor | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """Send each token through its experts and sum their answers by weight.

    Args:
        x: [T, H].
        gate_up_proj: [E, 2F, H], the gate's rows first; [E, F, H] for an activation without gate.
        down_proj: [E, H, F].
        plan: from :func:`plan` or :func:`plan_from_tokens`.
        weights: one a pair, shaped as the choice gave them; None: ones.
        activation: "swiglu", "geglu", "relu2", "silu" or "gelu".

    Returns:
        y [T, H]. Differentiable in x, both projections and the weights. Under autocast the
        matrix products run in autocast's dtype. Host sync: see :func:`grouped_linear`.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    n_experts, width, hidden = gate_up_proj.shape
    inner = width // ACTIVATIONS[activation]
    if x.dim() != 2 or x.shape[1] != hidden:
        raise ValueError(f"x must have shape [tokens, {hidden}], got {list(x.shape)}")
    if tuple(down_proj.shape) != (n_experts, hidden, inner):
        raise ValueError(
            f"down_proj must have shape {[n_experts, hidden, inner]} beside gate_up_proj"
            f" {list(gate_up_proj.shape)}, got {list(down_proj.shape)}"
        )
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, gate_up_proj, down_proj = x.to(dtype), gate_up_proj.to(dtype), down_proj.to(dtype)
    rows = dispatch(x, plan)
    hidden_rows = activate(grouped_linear(rows, gate_up_proj, plan.offsets), activation)
    return combine(grouped_linear(hidden_rows, down_proj, plan.offsets), plan, weights)


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
