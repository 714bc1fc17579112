"""The mixture-of-experts layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import ops
from .experts import Experts, SharedExperts
from .routers import ExpertChoiceRouter, RouterOutput, TopKRouter
from .sinkhorn_router import SinkhornRouter


class Routing(NamedTuple):
    """How a layer routed a batch, in tensors on its device: nothing waits until one is read."""

    load_balance_loss: Tensor  # scalar, 1 at perfect balance; differentiable
    router_z_loss: Tensor  # scalar; differentiable
    counts: Tensor  # [E] int32, pairs that asked for each expert
    num_kept: Tensor  # scalar int32, pairs that got a row

    def load(self) -> Tensor:
        """[E] the fraction of the pairs that asked for each expert."""
        return self.counts / self.counts.sum().clamp(min=1)

    def load_entropy(self) -> Tensor:
        """Entropy of the load in nats: log(E) at perfect balance, 0 when one expert takes all."""
        return torch.special.entr(self.load()).sum()

    def dropped_share(self) -> Tensor:
        """The fraction of the pairs that found no room."""
        return 1 - self.num_kept / self.counts.sum().clamp(min=1)


class MoE(nn.Module):
    """A mixture of experts: a router, experts, and optionally shared experts for every token.

    Args:
        hidden_size: H.
        intermediate_size: F, of one expert.
        num_experts: E, at most 1024.
        top_k: experts a token, at most 32; with expert choice, their mean number.
        router: "topk", "sinkhorn", "expert_choice", or a module with the routers' forward.
        activation: "swiglu", "geglu", "relu2", "silu" or "gelu".
        capacity_factor: None (no pair is dropped) or as in :class:`TopKRouter`.
        drop_policy: "order" or "weight".
        num_shared_experts: experts that every token passes.
        bias, recompute: of the routed experts, as in :class:`Experts`.
        jitter: noise on the router's input in training.
        **router_options: further arguments of the router.

    Example:
        >>> moe = MoE(hidden_size=512, intermediate_size=1024, num_experts=32, top_k=4)
        >>> y, routing = moe(torch.randn(8, 128, 512))
        >>> loss = y.square().mean() + 0.01 * routing.load_balance_loss
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int = 2,
        *,
        router: str | nn.Module = "topk",
        activation: str = "swiglu",
        capacity_factor: float | None = None,
        drop_policy: str = "order",
        num_shared_experts: int = 0,
        bias: bool = False,
        recompute: bool = False,
        jitter: float = 0.0,
        **router_options: Any,
    ) -> None:
        super().__init__()
        if isinstance(router, nn.Module):
            self.router = router
        elif router in ("topk", "sinkhorn"):
            kind = TopKRouter if router == "topk" else SinkhornRouter
            self.router = kind(
                hidden_size,
                num_experts,
                top_k,
                capacity_factor=capacity_factor,
                drop_policy=drop_policy,
                jitter=jitter,
                **router_options,
            )
        elif router == "expert_choice":
            if capacity_factor is not None or jitter:
                raise ValueError(
                    "capacity_factor and jitter must be left out with router='expert_choice': an"
                    " expert's capacity is top_k * tokens / num_experts"
                )
            self.router = ExpertChoiceRouter(hidden_size, num_experts, top_k, **router_options)
        else:
            raise ValueError(
                f"router must be 'topk', 'sinkhorn', 'expert_choice' or a module, got {router!r}"
            )
        self.hidden_size = hidden_size
        self.experts = Experts(
            num_experts, hidden_size, intermediate_size, activation, bias, recompute
        )
        self.shared_experts = (
            SharedExperts(num_shared_experts, hidden_size, intermediate_size, activation)
            if num_shared_experts
            else None
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Routing]:
        """x [..., H] and mask [...] bool (False: no routed expert) -> y [..., H], Routing.

        With 3 dimensions or more the last but one counts the tokens of a sequence.
        """
        if x.shape[-1] != self.hidden_size or x.dim() < 2:
            raise ValueError(f"x must have shape [..., {self.hidden_size}], got {list(x.shape)}")
        if mask is not None and mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask must have shape {list(x.shape[:-1])}, as x without its last dimension, got"
                f" {list(mask.shape)}"
            )
        tokens = x.reshape(-1, self.hidden_size)
        flat_mask = None if mask is None else mask.reshape(-1)
        num_sequences = 1 if x.dim() == 2 else max(1, x.shape[:-2].numel())
        routed: RouterOutput = self.router(tokens, flat_mask, num_sequences)
        plan = routed.plan
        y = self.experts(tokens, plan, routed.weights)
        if self.shared_experts is not None:
            y = y + self.shared_experts(tokens)
        routing = Routing(
            ops.moe.load_balance_loss(routed.logits, plan.counts, flat_mask),
            ops.moe.router_z_loss(routed.logsumexp, flat_mask),
            plan.counts,
            (plan.row_token >= 0).sum(dtype=torch.int32)
            if plan.token_offsets is not None
            else plan.offsets[-1],
        )
        return y.view(x.shape), routing

    def update_bias(self, counts: Tensor, rate: float = 1e-3) -> None:
        """One step of loss-free balancing, with `Routing.counts` of the step."""
        if not isinstance(self.router, TopKRouter):
            raise ValueError("update_bias must be called on a layer with a TopKRouter")
        self.router.update_bias(counts, rate)
