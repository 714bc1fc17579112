"""Routing tokens to experts, in plain PyTorch.

Symbols: T tokens, H model width, E experts, k experts a token, F expert width, C capacity.
Every function here is differentiable by autograd alone and exact in float64.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import ExpertChoice, Gate, Plan


def _real(logits: Tensor) -> Tensor:
    """Half-width types are computed in float32."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest of the last dimension, largest first, NaN last, ties to the
    lower index."""
    values = torch.where(values.isnan(), -torch.inf, values)
    return torch.sort(values, dim=-1, descending=True, stable=True).indices[..., :count]


def router_linear(x: Tensor, weight: Tensor) -> Tensor:
    """logits = x @ weight.T, in float32 or wider."""
    dtype = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    return x.to(dtype) @ weight.to(dtype).T


def gate(
    logits: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalize: bool = False,
    scale: float = 1.0,
    bias: Tensor | None = None,
    n_group: int = 1,
    topk_group: int = 1,
    threshold: Tensor | None = None,
    mask: Tensor | None = None,
) -> Gate:
    """Token choice. See :func:`sparsemoe.ops.moe.gate` for the arguments.

    The choice is by score + bias, restricted to the topk_group groups whose two best sum highest
    (DeepSeek-V3, arXiv 2412.19437, eq. 16 and section 2.1.2), and to scores >= threshold
    (arXiv 2603.11535). The weights are the chosen scores, without the bias.
    """
    logits = _real(logits)
    n_tokens, n_experts = logits.shape
    scores = {
        "softmax": lambda: logits.softmax(-1),
        "sigmoid": lambda: logits.sigmoid(),
        "softmax_after_topk": lambda: logits,
    }[scoring]()
    with torch.no_grad():
        by_logit = bias is None and n_group == 1  # the same order, without the softmax's rounding
        choice = logits if by_logit else scores if bias is None else scores + bias
        choice = torch.where(choice.isnan(), -torch.inf, choice)
        allowed = torch.ones_like(choice, dtype=torch.bool)
        if n_group > 1:
            grouped = choice.view(n_tokens, n_group, -1)
            group_scores = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
            chosen_groups = _largest(group_scores, topk_group)
            in_group = torch.zeros_like(group_scores, dtype=torch.bool)
            in_group.scatter_(1, chosen_groups, True)
            allowed &= in_group.repeat_interleave(n_experts // n_group, dim=1)
        if threshold is not None:
            allowed &= scores >= threshold
        if mask is not None:
            allowed &= mask[:, None]
        # Sort what is allowed before what is not, each by choice.
        order = _largest(choice, n_experts)
        order = order.gather(1, (~allowed).gather(1, order).sort(dim=1, stable=True).indices)
        experts = order[:, :top_k]
        valid = allowed.gather(1, experts)

    chosen = scores.gather(1, experts)
    if scoring == "sigmoid":
        weights = chosen.masked_fill(~valid, 0)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    elif scoring == "softmax_after_topk" or renormalize:
        # Chosen softmax scores divided by their sum are the softmax of the chosen logits.
        weights = logits.gather(1, experts).masked_fill(~valid, -torch.inf)
        weights = weights.masked_fill(~valid.any(-1, keepdim=True), 0).softmax(-1)
        weights = weights.masked_fill(~valid, 0)
    else:
        weights = chosen.masked_fill(~valid, 0)
    logsumexp = logits.logsumexp(-1)
    if mask is not None:
        logsumexp = logsumexp.masked_fill(~mask, 0)
    return Gate(weights * scale, experts.masked_fill(~valid, -1).int(), logsumexp)


def expert_choice(
    logits: Tensor, capacity: int, n_groups: int = 1, mask: Tensor | None = None
) -> ExpertChoice:
    """Each expert takes the `capacity` tokens of each group that score highest (Zhou et al.,
    arXiv 2202.09368, eq. 1-2); in the order of the tokens, -1 last where too few are unmasked.
    """
    logits = _real(logits)
    n_tokens, n_experts = logits.shape
    scores = logits.softmax(-1)
    with torch.no_grad():
        usable = torch.ones(n_tokens, dtype=torch.bool, device=logits.device)
        if mask is not None:
            usable = mask
        column = torch.where(scores.isnan(), -torch.inf, scores)
        column = torch.where(usable[:, None], column, -torch.inf).T.reshape(n_experts, n_groups, -1)
        missing = ~usable.view(1, n_groups, -1).expand_as(column)
        order = _largest(column, column.shape[-1])
        order = order.gather(2, missing.gather(2, order).sort(dim=2, stable=True).indices)
        chosen = order[..., :capacity].sort(-1).values
        absent = missing.gather(2, chosen)
        chosen = chosen.gather(2, absent.sort(dim=2, stable=True).indices)
        absent = missing.gather(2, chosen)
        group_start = torch.arange(n_groups, device=logits.device) * column.shape[-1]
        tokens = (chosen + group_start[None, :, None]).reshape(n_experts, -1)
        absent = absent.reshape(n_experts, -1)
    weights = scores.T.gather(1, tokens).masked_fill(absent, 0)
    lowest = weights.new_zeros(n_groups, n_experts)
    if capacity > 0:
        lowest = weights.detach().view(n_experts, n_groups, -1).amin(-1).T
    return ExpertChoice(weights, tokens.masked_fill(absent, -1).int(), lowest.contiguous())


def plan(
    experts: Tensor,
    num_experts: int,
    capacity: int | None = None,
    drop_policy: str = "order",
    weights: Tensor | None = None,
) -> Plan:
    """Rows sorted by expert, and by pair within an expert.

    With a capacity an expert keeps its first C pairs, all first choices before second choices
    (GShard, arXiv 2006.16668), or its C heaviest.
    """
    n_tokens, k = experts.shape
    device = experts.device
    flat = experts.flatten().long()
    valid = (flat >= 0) & (flat < num_experts)
    counts = torch.bincount(flat[valid], minlength=num_experts)
    n_rows = flat.numel()
    if capacity is not None:
        n_rows = min(n_rows, num_experts * capacity)
        pair = torch.arange(flat.numel(), device=device)
        if drop_policy == "order":
            priority = (pair % k if k else pair).argsort(stable=True)
        else:
            assert weights is not None
            key = torch.where(weights.isnan(), -torch.inf, weights).flatten()
            priority = key.argsort(descending=True, stable=True)
        one_hot = F.one_hot(torch.where(valid, flat, num_experts)[priority], num_experts + 1)
        rank = (one_hot.cumsum(0) - 1).gather(1, one_hot.argmax(1, keepdim=True)).squeeze(1)
        valid[priority] &= rank < capacity
    kept = counts if capacity is None else counts.clamp(max=capacity)
    offsets = F.pad(kept.cumsum(0), (1, 0))
    order = torch.where(valid, flat, num_experts).argsort(stable=True)[:n_rows]
    row_pair = torch.where(torch.arange(n_rows, device=device) < offsets[-1], order, -1)
    token_rows = torch.full_like(flat, -1)
    token_rows[row_pair[row_pair >= 0]] = torch.arange(n_rows, device=device)[row_pair >= 0]
    row_token = torch.where(row_pair >= 0, row_pair // max(k, 1), -1)
    return Plan(
        offsets.int(),
        counts.int(),
        row_token.int(),
        row_pair.int(),
        token_rows.view(n_tokens, k).int(),
        None,
    )


def plan_from_tokens(tokens: Tensor, num_tokens: int) -> Plan:
    """The plan of experts that chose their own tokens: row e*N+i carries tokens[e, i]."""
    n_experts, per_expert = tokens.shape
    flat = tokens.flatten().long()
    valid = (flat >= 0) & (flat < num_tokens)
    rows = torch.arange(flat.numel(), device=tokens.device)
    order = torch.where(valid, flat, num_tokens).argsort(stable=True)
    n_valid = valid.sum()
    token_rows = torch.where(rows < n_valid, order, -1)
    per_token = torch.bincount(flat[valid], minlength=num_tokens)
    return Plan(
        (torch.arange(n_experts + 1, device=tokens.device) * per_expert).int(),
        valid.view(n_experts, per_expert).sum(1).int(),
        torch.where(valid, flat, -1).int(),
        torch.where(valid, rows, -1).int(),
        token_rows.int(),
        F.pad(per_token.cumsum(0), (1, 0)).int(),
    )


def dispatch(x: Tensor, plan: Plan) -> Tensor:
    """rows[r] = x[row_token[r]], zero for a row that carries no token."""
    used = plan.row_token >= 0
    if not x.shape[0]:
        return x.new_zeros(len(used), x.shape[1])
    rows = x.index_select(0, plan.row_token.clamp(min=0))
    return torch.where(used[:, None], rows, 0)


def combine(rows: Tensor, plan: Plan, weights: Tensor | None = None) -> Tensor:
    """y[t] = sum over the rows r of token t of weight(r) * rows[r]."""
    real = _real(rows)
    n_tokens = (plan.token_rows if plan.token_offsets is None else plan.token_offsets[1:]).shape[0]
    y = real.new_zeros(n_tokens, rows.shape[1])
    used = (plan.row_token >= 0).nonzero().squeeze(1)
    values = real[used]
    if weights is not None:
        values = values * weights.flatten()[plan.row_pair[used]].to(real.dtype)[:, None]
    # A row without a token is left out, not multiplied by zero: it may hold anything.
    return y.index_add(0, plan.row_token[used].long(), values).to(rows.dtype)


def grouped_mm(a: Tensor, b: Tensor, offsets: Tensor) -> Tensor:
    """y[r] = a[r] @ b[e] for the rows r of expert e: offsets[e] <= r < offsets[e+1]; zero past the
    last offset."""
    bounds = offsets.tolist()
    parts = [a[start:stop] @ b[e] for e, (start, stop) in enumerate(pairwise(bounds))]
    parts.append(a.new_zeros(len(a) - bounds[-1], b.shape[2]))
    return torch.cat(parts)


def activate(hidden: Tensor, activation: str) -> Tensor:
    """The experts' nonlinearity; of a gated one, the first half of the columns is the gate."""
    if activation in ("swiglu", "geglu"):
        g, up = hidden.chunk(2, dim=-1)
        g = F.silu(g) if activation == "swiglu" else F.gelu(g)
        return g * up if torch.is_grad_enabled() else g.mul_(up)
    if activation == "relu2":
        return F.relu(hidden).square()
    return {"silu": F.silu, "gelu": F.gelu}[activation](hidden)


def experts(
    x: Tensor,
    gate_up_proj: Tensor,
    down_proj: Tensor,
    plan: Plan,
    weights: Tensor | None = None,
    activation: str = "swiglu",
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
) -> Tensor:
    """Each token through its experts, summed by weight."""
    offsets = plan.offsets

    def linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = grouped_mm(rows, weight.mT, offsets)
        if bias is None:
            return y
        of_row = bias.repeat_interleave(offsets.diff(), 0)
        return y + F.pad(of_row, (0, 0, 0, len(y) - len(of_row)))

    hidden = activate(linear(dispatch(x, plan), gate_up_proj, gate_up_bias), activation)
    return combine(linear(hidden, down_proj, down_bias), plan, weights)


def load_balance_loss(logits: Tensor, counts: Tensor, mask: Tensor | None = None) -> Tensor:
    """E * sum_e f_e * p_e, f_e the fraction of pairs sent to expert e, p_e the mean softmax
    probability (Switch Transformers, arXiv 2101.03961, eq. 4)."""
    probabilities = _real(logits).softmax(-1)
    if mask is not None:
        probabilities = probabilities[mask]
    fraction = counts.to(probabilities.dtype) / counts.sum().clamp(min=1)
    mean = probabilities.sum(0) / max(len(probabilities), 1)
    return counts.numel() * (fraction * mean).sum()


def router_z_loss(logsumexp: Tensor, mask: Tensor | None = None) -> Tensor:
    """mean(logsumexp^2) (ST-MoE, arXiv 2202.08906, eq. 5)."""
    if mask is not None:
        logsumexp = logsumexp[mask]
    return logsumexp.square().sum() / max(len(logsumexp), 1)


def update_expert_bias_(bias: Tensor, counts: Tensor, rate: float) -> Tensor:
    """bias += rate * sign(mean load - load) (loss-free balancing, arXiv 2408.15664, alg. 1)."""
    load = counts.to(bias.dtype)
    return bias.add_(rate * torch.sign(load.mean() - load))
