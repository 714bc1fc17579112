"""Token choice by a plan that Sinkhorn's iterations have balanced."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..types import Gate
from .routers import RouterOutput, _TokenChoice


class SinkhornRouter(_TokenChoice):
    """Token choice that is balanced in training without a loss for it (S-BASE, arXiv 2202.01169).

    In training each token takes the k experts for which its row of the balanced plan
    P = diag(u) exp(logits / temperature) diag(v) is largest: of the whole batch, or of its sequence
    alone. That looks at all tokens, later ones too. The choice itself carries no gradient and, with
    weights from the scores, nothing else of the plan is used, as in Megatron-LM. Otherwise no token
    looks at another: a causal model trained so can generate.

    u scales all of a token's row alike, so the choice is by logits + temperature * log v. Training
    keeps a moving average of that shift, and with `inference="bias"` adds it to the logits, for the
    choice only: experts are then as balanced as in training, where the text is alike, though each
    token is routed by itself. With `inference="topk"` the choice is that of :class:`TopKRouter`. It
    may be set after training too: `router.inference = "bias"`.

    Args:
        hidden_size: H.
        num_experts: E, at most 1024.
        top_k: k, at most 32.
        n_iters, tolerance, temperature: see :func:`sparsemoe.ops.sinkhorn.sinkhorn`. With top_k=1 a
            lower temperature balances better, and needs more iterations.
        per_sequence: balance the tokens of each sequence, instead of the batch's.
        inference: "topk" or "bias".
        momentum: of the moving average.
        weights_from: "scores", or "plan": entries of the plan, differentiable through its
            iterations; at inference softmax((logits + bias) / temperature), the bias as chosen by.
        scoring, renormalize, scale: the weights of the chosen; see :func:`sparsemoe.ops.moe.gate`.
            With weights from the plan there is no scoring but "softmax".
        capacity_factor, drop_policy, jitter: as in :class:`TopKRouter`.
    """

    expert_bias: Tensor  # [E], of mean 0

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        top_k: int,
        *,
        n_iters: int = 8,
        tolerance: float | None = None,
        temperature: float = 1.0,
        per_sequence: bool = False,
        inference: str = "topk",
        momentum: float = 0.99,
        weights_from: str = "scores",
        scoring: str = "softmax",
        renormalize: bool = True,
        scale: float = 1.0,
        capacity_factor: float | None = None,
        drop_policy: str = "order",
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
        if n_iters < 1:
            raise ValueError(f"n_iters must be 1 or more, got {n_iters}")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"tolerance must be 0 or more or None, got {tolerance}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if inference not in ("topk", "bias"):
            raise ValueError(f"inference must be 'topk' or 'bias', got {inference!r}")
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must be from 0 to below 1, got {momentum}")
        if weights_from not in ("scores", "plan"):
            raise ValueError(f"weights_from must be 'scores' or 'plan', got {weights_from!r}")
        if scoring not in ("softmax", "sigmoid", "softmax_after_topk"):
            raise ValueError(
                f"scoring must be 'softmax', 'sigmoid' or 'softmax_after_topk', got {scoring!r}"
            )
        if weights_from == "plan" and scoring != "softmax":
            raise ValueError(f"scoring must be 'softmax' with weights_from='plan', got {scoring!r}")
        self.n_iters, self.tolerance, self.temperature = n_iters, tolerance, temperature
        self.per_sequence, self.inference, self.momentum = per_sequence, inference, momentum
        self.weights_from = weights_from
        self.register_buffer("expert_bias", torch.zeros(num_experts))

    def forward(self, x: Tensor, mask: Tensor | None = None, num_sequences: int = 1):
        """x [T, H] of `num_sequences` equally long sequences, mask [T] bool -> RouterOutput.

        A masked token takes no expert and no part in the balance.
        """
        logits = self._logits(x)
        shift, plan = None, None
        if self.training:
            shift, plan = self._balance(logits, mask, num_sequences)
        elif self.inference == "bias":
            shift = self.expert_bias.to(logits.dtype)
        chosen = self._choose(logits, shift, mask)
        weights = chosen.weights
        if self.weights_from == "plan":
            if plan is None:
                shifted = logits if shift is None else logits + shift
                plan = (shifted / self.temperature).softmax(-1)
            weights = self._finish(plan.gather(1, _index(chosen.experts)), chosen, self.renormalize)
        elif self.scoring == "sigmoid":
            weights = self._finish(
                _picked(logits, chosen.experts).sigmoid(), chosen, self.renormalize
            )
        elif self.scoring == "softmax" and not self.renormalize:
            log_scores = _picked(logits, chosen.experts) - chosen.logsumexp[:, None]
            weights = self._finish(log_scores.exp(), chosen)
        return RouterOutput(self._plan(chosen.experts, weights), weights, logits, chosen.logsumexp)

    def _balance(
        self, logits: Tensor, mask: Tensor | None, num_sequences: int
    ) -> tuple[Tensor, Tensor]:
        """What to add to the logits to choose by, [E] or [sequences, E], and the plan [T, E];
        follows it with the bias."""
        groups = num_sequences if self.per_sequence else 1
        shape = (groups, len(logits) // groups)
        by_scores = self.weights_from == "scores"
        grouped = (logits.detach() if by_scores else logits).view(*shape, self.num_experts)
        grouped_mask = None if mask is None else mask.view(shape)
        balanced = ops.sinkhorn.sinkhorn(
            grouped,
            self.n_iters,
            self.tolerance,
            self.temperature,
            mask=grouped_mask,
            return_scalings=True,
            check=False,
        )
        with torch.no_grad():
            shift = self.temperature * balanced.log_v  # [groups, E]
            if len(logits):
                self._follow(shift, grouped_mask)
        return shift if groups > 1 else shift[0], balanced.plan.view_as(logits)

    def _follow(self, shift: Tensor, mask: Tensor | None) -> None:
        """Moves the bias towards the mean shift of the tokens that take part."""
        # A shift stands for any that differs by a constant, which the choice does not see.
        centred = shift - shift.mean(-1, keepdim=True)
        rate: float | Tensor = 1 - self.momentum
        if mask is None:
            mean = centred.mean(0)
        else:
            tokens = mask.sum(-1, keepdim=True)  # [groups, 1]
            total = tokens.sum()
            mean = (centred * tokens).sum(0) / total.clamp(min=1)
            rate = (rate * (total > 0)).to(self.expert_bias.dtype)
        self.expert_bias.lerp_(mean.to(self.expert_bias.dtype), rate)

    def _choose(self, logits: Tensor, shift: Tensor | None, mask: Tensor | None) -> Gate:
        """The experts of the largest logits + shift. The weights are the softmax of the chosen
        logits, which are also the scores of a softmax over all experts divided by their sum."""
        scoring = "softmax_after_topk"  # with which the gate adds its bias to the logits
        if shift is None or shift.dim() == 1:
            return ops.moe.gate(
                logits, self.top_k, scoring=scoring, scale=self.scale, bias=shift, mask=mask
            )
        with torch.no_grad():
            shifted = logits.view(len(shift), -1, self.num_experts) + shift[:, None]
            experts = ops.moe.gate(
                shifted.view_as(logits), self.top_k, scoring=scoring, mask=mask
            ).experts
        logsumexp = logits.logsumexp(-1)
        if mask is not None:
            logsumexp = logsumexp.masked_fill(~mask, 0)
        chosen = Gate(_picked(logits, experts).softmax(-1), experts, logsumexp)
        return chosen._replace(weights=self._finish(chosen.weights, chosen))

    def _finish(self, scores: Tensor, chosen: Gate, renormalize: bool = False) -> Tensor:
        """The weights [T, k] of the chosen experts' scores."""
        weights = scores.masked_fill(chosen.experts < 0, 0)
        if renormalize:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale


def _index(experts: Tensor) -> Tensor:
    """To gather by; where there is no expert, the first."""
    return experts.clamp(min=0).long()


def _picked(logits: Tensor, experts: Tensor) -> Tensor:
    """The chosen logits [T, k], 0 where there is no expert."""
    return logits.gather(1, _index(experts)).masked_fill(experts < 0, 0)
