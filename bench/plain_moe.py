"""Routing tokens to experts as one would write it in plain PyTorch for speed, without host syncs
where that can be had. Not the reference: these take dropless, well-formed inputs only."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsemoe.types import Plan


def router_linear(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x.float(), weight.float())


def gate(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Softmax, top-k and renormalising, without the log-sum-exp. The order of least work."""
    best, experts = logits.topk(top_k)
    return best.softmax(-1), experts


def gate_softmax_first(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, experts = logits.softmax(-1).topk(top_k)
    return weights / weights.sum(-1, keepdim=True), experts


def expert_choice(logits: Tensor, capacity: int, n_groups: int) -> tuple[Tensor, Tensor]:
    n_experts = logits.shape[1]
    scores = logits.softmax(-1).T.reshape(n_experts, n_groups, -1)
    weights, tokens = scores.topk(capacity)
    tokens = tokens + torch.arange(n_groups, device=logits.device)[:, None] * scores.shape[-1]
    return weights.reshape(n_experts, -1), tokens.reshape(n_experts, -1)


def plan(experts: Tensor, num_experts: int) -> Plan:
    by_expert, row_pair = experts.flatten().sort(stable=True)
    return _plan(experts, row_pair, _starts(by_expert, num_experts))


def plan_bincount(experts: Tensor, num_experts: int) -> Plan:
    row_pair = experts.flatten().argsort(stable=True)
    counts = experts.flatten().bincount(minlength=num_experts)
    return _plan(experts, row_pair, F.pad(counts.cumsum(0), (1, 0)))


def plan_capped(
    experts: Tensor, num_experts: int, capacity: int, weights: Tensor | None = None
) -> Plan:
    """All first choices before second choices, or the heaviest first. Rows of an expert are in that
    order."""
    n = experts.numel()
    if weights is None:
        pairs = torch.arange(n, device=experts.device).view_as(experts).T.flatten()
    else:
        pairs = weights.flatten().argsort(descending=True)
    by_expert, order = experts.flatten()[pairs].sort(stable=True)
    starts = _starts(by_expert, num_experts)
    counts = starts.diff()
    offsets = F.pad(counts.clamp(max=capacity).cumsum(0), (1, 0))
    rank = torch.arange(n, device=experts.device) - starts[by_expert]
    rows = torch.where(rank < capacity, offsets[by_expert] + rank, -1)
    pairs = pairs[order]
    token_rows = torch.empty_like(pairs).scatter_(0, pairs, rows).view_as(experts)
    n_rows = min(n, num_experts * capacity)
    row_pair = torch.full((n_rows + 1,), -1, device=experts.device)
    row_pair = row_pair.scatter_(0, torch.where(rows < 0, n_rows, rows), pairs)[:-1]
    row_token = torch.where(row_pair < 0, -1, row_pair // experts.shape[1])
    return Plan(offsets, counts, row_token, row_pair, token_rows, None)


def _starts(by_expert: Tensor, num_experts: int) -> Tensor:
    numbers = torch.arange(num_experts + 1, device=by_expert.device, dtype=by_expert.dtype)
    return torch.searchsorted(by_expert, numbers)


def _plan(experts: Tensor, row_pair: Tensor, offsets: Tensor) -> Plan:
    rows = torch.arange(experts.numel(), device=experts.device)
    token_rows = torch.empty_like(row_pair).scatter_(0, row_pair, rows).view_as(experts)
    return Plan(offsets, offsets.diff(), row_pair // experts.shape[1], row_pair, token_rows, None)


def dispatch(x: Tensor, plan: Plan) -> Tensor:
    return x.index_select(0, plan.row_token)


def combine(rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    values = rows[plan.token_rows]
    if weights is not None:
        values = values * weights.to(rows.dtype)[..., None]
    return values.sum(1)


def combine_index_add(rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    if weights is not None:
        rows = rows * weights.flatten()[plan.row_pair].to(rows.dtype)[:, None]
    return rows.new_zeros(len(plan.token_rows), rows.shape[1]).index_add(0, plan.row_token, rows)


def combine_bmm(rows: Tensor, plan: Plan, weights: Tensor) -> Tensor:
    return (weights.to(rows.dtype)[:, None] @ rows[plan.token_rows]).squeeze(1)


def combine_embedding_bag(rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    weights = None if weights is None else weights.to(rows.dtype)
    return F.embedding_bag(plan.token_rows, rows, mode="sum", per_sample_weights=weights)


def combine_backward(
    grad: Tensor, rows: Tensor, plan: Plan, weights: Tensor
) -> tuple[Tensor, Tensor]:
    grad = grad.index_select(0, plan.row_token)
    grad_weights = (grad * rows).sum(-1, dtype=weights.dtype)[plan.token_rows]
    row_weights = weights.flatten().index_select(0, plan.row_pair).to(rows.dtype)
    return grad * row_weights[:, None], grad_weights


def load_balance_loss(logits: Tensor, counts: Tensor) -> Tensor:
    return len(counts) * (counts / counts.sum() * logits.softmax(-1).mean(0)).sum()


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    function = getattr(F, "grouped_mm", None) or torch._grouped_mm
    return function(a, b, offs=offsets[1:].int())


def loop_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """One matrix product an expert, after a host sync."""
    parts = a.split(offsets.diff().tolist())
    return torch.cat([part @ matrix for part, matrix in zip(parts, b, strict=True)])


def products(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    return (loop_mm if a.device.type == "cpu" else grouped_mm)(a, b, offsets)


def swiglu(hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    gate = F.silu(gate)
    return gate * up if torch.is_grad_enabled() else gate.mul_(up)


def experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    plan: Plan,
    weights: Tensor,
    mm: Callable[..., Tensor] = products,
    sum_rows: Callable[..., Tensor] = combine,
) -> Tensor:
    hidden = swiglu(mm(dispatch(x, plan), gate_up_proj.mT, plan.offsets))
    rows = mm(hidden, down_proj.mT, plan.offsets)
    return sum_rows(rows, plan, weights)
