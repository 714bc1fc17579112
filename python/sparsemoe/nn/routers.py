"""Routers: from tokens to the experts that they take, or that take them."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from ..types import Plan
from .experts import RouterLinear, _check_sizes


class RouterOutput(NamedTuple):
    """What a layer needs of a router."""

    plan: Plan
    weights: Tensor  # one a pair of the plan
    logits: Tensor  # [T, E]
    logsumexp: Tensor  # [T]


class _TokenChoice(nn.Module):
    """What routers share by which every token takes k experts; the arguments are TopKRouter's."""

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        scoring: str,
        renormalize: bool,
        scale: float,
        capacity_factor: float | None,
        drop_policy: str,
        jitter: float,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size=hidden_size, num_experts=num_experts, top_k=top_k)
        if top_k > num_experts:
            raise ValueError(f"top_k must be at most num_experts = {num_experts}, got {top_k}")
        if capacity_factor is not None and capacity_factor <= 0:
            raise ValueError(f"capacity_factor must be above 0 or None, got {capacity_factor}")
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter must be from 0 to below 1, got {jitter}")
        self.linear = RouterLinear(hidden_size, num_experts)
        self.num_experts, self.top_k = num_experts, top_k
        self.scoring, self.renormalize, self.scale = scoring, renormalize, scale
        self.capacity_factor, self.drop_policy = capacity_factor, drop_policy
        self.jitter = jitter

    def capacity(self, num_tokens: int) -> int | None:
        """The rows that an expert keeps of `num_tokens` tokens."""
        if self.capacity_factor is None:
            return None
        pairs = num_tokens * self.top_k
        # ceil, exact for the decimal factors that people write
        millionths = round(self.capacity_factor * 1_000_000)
        return -(-millionths * pairs // (1_000_000 * self.num_experts))

    def _logits(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, E]"""
        if self.training and self.jitter:
            x = x * torch.empty_like(x).uniform_(1 - self.jitter, 1 + self.jitter)
        return self.linear(x)

    def _plan(self, experts: Tensor, weights: Tensor) -> Plan:
        """The plan of choices [T, k]."""
        return ops.moe.plan(
            experts,
            self.num_experts,
            capacity=self.capacity(len(experts)),
            drop_policy=self.drop_policy,
            weights=weights,
        )


class TopKRouter(_TokenChoice):
    """Token choice: every token takes its k best experts.

    Args:
        hidden_size: H.
        num_experts: E, at most 1024.
        top_k: k, at most 32.
        scoring, renormalize, scale, n_group, topk_group: see :func:`sparsemoe.ops.moe.gate`.
        capacity_factor: an expert keeps ceil(capacity_factor * T * k / E) pairs; None keeps all.
        drop_policy: "order" or "weight"; see :func:`sparsemoe.ops.moe.plan`.
        expert_bias: keep a bias for loss-free balancing, moved by :meth:`update_bias`.
        jitter: multiplies the input by U(1 - jitter, 1 + jitter) in training.
    """

    expert_bias: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        scoring: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        n_group: int = 1,
        topk_group: int = 1,
        capacity_factor: float | None = None,
        drop_policy: str = "order",
        expert_bias: bool = False,
        jitter: float = 0.0,
    ) -> None:
        super().__init__(
            hidden_size,
            num_experts,
            top_k,
            scoring,
            renormalize,
            scale,
            capacity_factor,
            drop_policy,
            jitter,
        )
        self.n_group, self.topk_group = n_group, topk_group
        bias = torch.zeros(num_experts) if expert_bias else None
        self.register_buffer("expert_bias", bias)

    def forward(self, x: Tensor, mask: Tensor | None = None, num_sequences: int = 1):
        """x [T, H], mask [T] bool -> RouterOutput."""
        logits = self._logits(x)
        bias = self.expert_bias
        chosen = ops.moe.gate(
            logits,
            self.top_k,
            scoring=self.scoring,
            renormalize=self.renormalize,
            scale=self.scale,
            bias=None if bias is None else bias.to(logits.dtype),
            n_group=self.n_group,
            topk_group=self.topk_group,
            mask=mask,
        )
        plan = self._plan(chosen.experts, chosen.weights)
        return RouterOutput(plan, chosen.weights, logits, chosen.logsumexp)

    def update_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """Move the bias towards balance, after a step; `counts` as in `Plan.counts`."""
        if self.expert_bias is None:
            raise ValueError("expert_bias must be True where the bias is updated, got False")
        ops.moe.update_expert_bias_(self.expert_bias, counts, rate)


class ExpertChoiceRouter(nn.Module):
    """Expert choice: every expert takes the tokens that score highest for it (arXiv 2202.09368).

    Without `causal` the choice looks over whole sequences, later tokens included: use it where all
    tokens are known, in an encoder say. With `causal` training keeps for every expert a moving
    average of the lowest score that it took, and a token goes to the experts whose average it
    reaches (arXiv 2603.11535), whatever the other tokens: for language models.

    Args:
        hidden_size: H.
        num_experts: E.
        experts_per_token: the mean number of experts a token, c: an expert takes n*c/E of n tokens.
        causal: choose by the moving averages.
        momentum: of the averages.
        max_experts: with `causal`, the most experts that a token can take.
    """

    threshold: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        experts_per_token: float,
        *,
        causal: bool = False,
        momentum: float = 0.99,
        max_experts: int | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(hidden_size=hidden_size, num_experts=num_experts)
        if not 0 < experts_per_token <= num_experts:
            raise ValueError(
                f"experts_per_token must be above 0 and at most num_experts = {num_experts},"
                f" got {experts_per_token}"
            )
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, got {momentum}")
        self.linear = RouterLinear(hidden_size, num_experts)
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.causal, self.momentum = causal, momentum
        self.max_experts = max_experts or min(num_experts, 32, 4 * max(1, round(experts_per_token)))
        self.register_buffer("threshold", torch.full((num_experts,), 1 / num_experts))
        self._warned = causal

    def capacity(self, num_tokens: int) -> int:
        """The tokens that an expert takes of a sequence of `num_tokens`."""
        wanted = round(num_tokens * self.experts_per_token / self.num_experts)
        return min(num_tokens, max(1, wanted))

    def forward(self, x: Tensor, mask: Tensor | None = None, num_sequences: int = 1):
        """x [T, H] of `num_sequences` equally long sequences, mask [T] bool -> RouterOutput."""
        logits = self.linear(x)
        capacity = self.capacity(len(x) // num_sequences)
        if not self.causal:
            chosen = ops.moe.expert_choice(logits, capacity, n_groups=num_sequences, mask=mask)
            plan = ops.moe.plan_from_tokens(chosen.tokens, len(x))
            return RouterOutput(plan, chosen.weights, logits, logits.logsumexp(-1))
        if self.training and len(x):
            with torch.no_grad():
                lowest = ops.moe.expert_choice(
                    logits.detach(), capacity, n_groups=num_sequences, mask=mask
                ).threshold
                self.threshold.lerp_(lowest.mean(0).to(self.threshold.dtype), 1 - self.momentum)
        gated = ops.moe.gate(
            logits, self.max_experts, threshold=self.threshold.to(logits.dtype), mask=mask
        )
        plan = ops.moe.plan(gated.experts, self.num_experts)
        return RouterOutput(plan, gated.weights, logits, gated.logsumexp)

    def warn_if_used_causally(self) -> None:
        """For causal models to call: says once that choosing over sequences leaks later tokens."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                "ExpertChoiceRouter without causal=True chooses tokens by looking at later ones; a"
                " causal model trained so cannot generate as it was trained",
                stacklevel=3,
            )
