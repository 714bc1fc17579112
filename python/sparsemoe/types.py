"""What the ops return."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Gate(NamedTuple):
    """The experts that each token chose."""

    weights: Tensor  # [T, k] float32 (float64 for float64 logits); 0 where there is no expert
    experts: Tensor  # [T, k] int32; -1 where there is no expert
    logsumexp: Tensor  # [T] of the logits, dtype as weights; 0 for a masked token


class ExpertChoice(NamedTuple):
    """The tokens that each expert chose, N = n_groups * capacity of them."""

    weights: Tensor  # [E, N] float32 (float64 for float64 logits); 0 where there is no token
    tokens: Tensor  # [E, N] int32, ascending in each group; -1 where there is no token
    threshold: Tensor  # [n_groups, E] the lowest weight that was chosen; 0 where C was not reached


class Plan(NamedTuple):
    """Where the tokens of a layer go: R rows sorted by expert, and back.

    A *pair* is one (token, expert) choice, numbered as the flattened weights are. Unused entries
    are -1. All tensors are int32 and their sizes follow from the arguments of the call.
    """

    offsets: Tensor  # [E+1] rows offsets[e] .. offsets[e+1] belong to expert e
    counts: Tensor  # [E] pairs that asked for each expert, before any was dropped
    row_token: Tensor  # [R] the token that each row carries
    row_pair: Tensor  # [R] the pair that each row carries
    token_rows: Tensor  # [T, k] the rows of each token; [R], listed by token, with token_offsets
    token_offsets: Tensor | None  # [T+1] where each token's rows begin in a flat token_rows


class Encoded(NamedTuple):
    """Vectors as codes, and what the codes stand for. Q' stages were used."""

    codes: Tensor  # [..., Q'] int32
    quantized: Tensor  # [..., D] the sum of the chosen codes, dtype as the vectors
    errors: Tensor  # [..., Q'] squared error after each stage, float32 (float64 for float64)


class Balanced(NamedTuple):
    """A balanced plan and how it was reached: P = exp(logits / temperature + log_u + log_v)."""

    plan: Tensor  # [..., T, E] float32 (float64 for float64 logits); rows sum to their marginal
    log_u: Tensor  # [..., T]; -inf where the row takes no part
    log_v: Tensor  # [..., E]
    error: Tensor  # [...] sum over experts of |column sum - its marginal|, over the total
    iterations: Tensor  # [...] int32, how many ran
