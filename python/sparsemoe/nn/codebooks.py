"""The codebooks of a quantizer: how they are searched, and how they learn."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .codebook_updates import (
    CodebookErrors,
    ema_update_,
    replacements,
    revive_,
    snapshot,
    world_size,
)
from .kmeans import gather_sample, kmeans
from .quantizer_metrics import code_usage

LEARNING = ("ema", "gradient")
_SAMPLES_PER_CODE = 64  # of k-means; Faiss asks for 39 at least


def _check_choice(**choices: tuple[str, tuple[str, ...]]) -> None:
    for name, (value, allowed) in choices.items():
        if value not in allowed:
            raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _check_range(low: float, high: float | None = None, **values: float) -> None:
    for name, value in values.items():
        if not low <= value <= (float("inf") if high is None else high):
            wanted = f"{low} or more" if high is None else f"from {low} to {high}"
            raise ValueError(f"{name} must be {wanted}, got {value}")


def _after_loading(module: Any, _: Any) -> None:
    if not module.initialized.is_meta:
        module._ready = bool(module.initialized)


class Codebooks(nn.Module):
    """Q codebooks of K codes, C wide: the part of ResidualVQ that works on vectors of that width.

    Arguments and attributes are those of :class:`sparsemoe.nn.ResidualVQ`.
    """

    codebooks: Tensor
    cluster_size: Tensor
    embed_sum: Tensor | None
    initialized: Tensor

    def __init__(
        self,
        width: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        metric: str,
        learning: str,
        decay: float,
        epsilon: float,
        dead_code_threshold: float,
        kmeans_init: bool,
        kmeans_iters: int,
        shared_codebook: bool,
        rotation_trick: bool,
        beam: int,
        exact: bool,
    ) -> None:
        super().__init__()
        _check_choice(metric=(metric, ops.rvq.METRICS), learning=(learning, LEARNING))
        _check_range(0, 1, decay=decay)
        _check_range(0, kmeans_iters=kmeans_iters, dead_code_threshold=dead_code_threshold)
        _check_range(1, 32, beam=beam)
        if not epsilon > 0:
            raise ValueError(f"epsilon must be above 0, got {epsilon}")
        if beam > 1 and metric != "l2":
            raise ValueError(f"beam must be 1 with metric={metric!r}, got {beam}")
        self.num_quantizers, self.codebook_size = num_quantizers, codebook_size
        self.codebook_dim, self.metric, self.learning = width, metric, learning
        self.decay, self.epsilon = decay, epsilon
        self.dead_code_threshold, self.kmeans_iters = dead_code_threshold, kmeans_iters
        self.shared_codebook, self.rotation_trick = shared_codebook, rotation_trick
        self.beam, self.exact = beam, exact
        self._unit_codes = metric == "cosine" and learning == "ema"

        stages = 1 if shared_codebook else num_quantizers
        codebooks = torch.empty(stages, codebook_size, width)
        nn.init.uniform_(codebooks, -1 / codebook_size, 1 / codebook_size)
        if self._unit_codes:
            codebooks = F.normalize(codebooks, dim=-1)
        if learning == "gradient":
            self.codebooks = nn.Parameter(codebooks)
        else:
            self.register_buffer("codebooks", codebooks)
        self.register_buffer("cluster_size", torch.ones(stages, codebook_size))
        self.register_buffer("embed_sum", codebooks.clone() if learning == "ema" else None)
        # The buffer is for checkpoints. What forward asks is a Python flag: no wait for the device.
        self.register_buffer("initialized", torch.tensor(not kmeans_init))
        self._ready = not kmeans_init
        self.register_load_state_dict_post_hook(_after_loading)

    @property
    def _moves_codes(self) -> bool:
        """Whether a training step changes codebooks or cluster_size in place."""
        return self.learning == "ema" or self.dead_code_threshold > 0

    def _into_codes(self, x: Tensor, stage: int) -> Tensor:
        """What a stage looks up of its residual. Where each stage projects, this is overridden."""
        return x

    def _out_of_codes(self, x: Tensor, stage: int) -> Tensor:
        """What a stage subtracts from its residual."""
        return x

    def _stages(self, first: int, last: int) -> Tensor:
        """[last - first, K, C] float32 or float64."""
        if self.shared_codebook:
            codebooks = self.codebooks.expand(last - first, -1, -1)
        else:
            codebooks = self.codebooks[first:last]
        return codebooks if codebooks.dtype == torch.float64 else codebooks.float()

    def _encode(
        self, x: Tensor, valid: Tensor | None, first: int, last: int, learn: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Stages first .. last - 1 of x [N, C], then, with `learn`, a step of the codebooks.

        Returns quantized [N, C], codes [N, Q'] (-1 for padding), errors [N, Q'] with their gradient
        to x, and errors with their gradient to the codebooks.
        """
        codebooks = self._stages(first, last)
        values = codebooks.detach()
        learn = learn and self._moves_codes
        if learn and torch.is_grad_enabled():
            values = snapshot(values)  # the backward pass reads them as they were
        n = last - first
        if self.beam > 1:
            codes, quantized, errors = ops.rvq.beam_encode(x, values, beam=self.beam, n_stages=n)
        else:
            codes, quantized, errors = ops.rvq.encode(
                x, values, n_stages=n, metric=self.metric, exact=self.exact
            )
        if self.rotation_trick:
            quantized = ops.rvq.rotate(x, quantized)
        if valid is not None:
            codes = torch.where(valid[:, None], codes, -1)
        x, codebook_errors = x.detach(), errors.detach()
        if learn:
            self._learn(x, codes, codebook_errors, values, valid, first, last)
        if self.learning == "gradient":
            codebook_errors = CodebookErrors.apply(codebooks, values, x, codes, codebook_errors)
        return quantized, codes, errors, codebook_errors

    @torch.no_grad()
    def _learn(
        self,
        x: Tensor,
        codes: Tensor,
        errors: Tensor,
        values: Tensor,
        valid: Tensor | None,
        first: int,
        last: int,
    ) -> None:
        """Move the averages, the codes that follow them, and the codes that nothing chooses."""
        revives = self.dead_code_threshold > 0
        stages = slice(0, 1) if self.shared_codebook else slice(first, last)
        codebooks, cluster_size = self.codebooks[stages], self.cluster_size[stages]
        embed_sum = None if self.embed_sum is None else self.embed_sum[stages]
        if revives:  # of the codes as they were
            vectors, there = replacements(x, codes, values, valid)
        if embed_sum is None:
            counts = self._joined(code_usage(codes, self.codebook_size).counts)
            counts = counts.to(cluster_size.dtype)
            if world_size() > 1:
                dist.all_reduce(counts)
            cluster_size.lerp_(counts, 1 - self.decay)
        elif self.shared_codebook or self._unit_codes:
            weights = self._inverse_lengths(x, errors) if self._unit_codes else None
            sums, counts = ops.rvq.code_sums(x, codes, self.codebook_size, values, weights)
            ema_update_(
                codebooks,
                cluster_size,
                embed_sum,
                self._joined(sums),
                self._joined(counts),
                decay=self.decay,
                epsilon=self.epsilon,
                unit=self._unit_codes,
            )
        else:
            ops.rvq.ema_update(
                codebooks,
                cluster_size,
                embed_sum,
                x,
                codes,
                decay=self.decay,
                epsilon=self.epsilon,
            )
        if revives:
            if self.shared_codebook:  # by turns of the stages
                code = torch.arange(self.codebook_size, device=x.device)
                vectors = vectors[code % (last - first), code][None]
            if self._unit_codes:
                vectors = F.normalize(vectors, dim=-1)
            revive_(codebooks, cluster_size, embed_sum, vectors, there, self.dead_code_threshold)

    def _joined(self, by_stage: Tensor) -> Tensor:
        """A shared codebook sums over the stages."""
        return by_stage.sum(0, keepdim=True) if self.shared_codebook else by_stage

    @staticmethod
    def _inverse_lengths(x: Tensor, errors: Tensor) -> Tensor:
        """[N, Q'] 1 / |r_{q-1}|, from the squared lengths that `encode` returned."""
        squares = x.to(errors.dtype).square().sum(-1, keepdim=True)
        return torch.cat([squares, errors[:, :-1]], 1).clamp(min=1e-12).rsqrt()

    @torch.no_grad()
    def _initialize(self, x: Tensor, valid: Tensor | None) -> None:
        """k-means of a sample of the batch, stage after stage on what the stages before left."""
        sample, found = gather_sample(x.detach(), valid, _SAMPLES_PER_CODE * self.codebook_size)
        if not found:
            return  # all padding: the next batch
        residual = sample.to(self._stages(0, 1).dtype)
        sizes = [self.codebook_size] * self.num_quantizers
        if self.shared_codebook:  # each stage gives some of the codes
            share, more = divmod(self.codebook_size, self.num_quantizers)
            sizes = [share + (q < more) for q in range(self.num_quantizers) if share or q < more]
        found_codes, found_counts = [], []
        for q, size in enumerate(sizes):
            z = self._into_codes(residual, q)
            codes, counts = kmeans(
                F.normalize(z, dim=-1) if self._unit_codes else z,
                size,
                self.kmeans_iters,
                metric=self.metric,
                unit=self._unit_codes,
            )
            found_codes.append(codes)
            found_counts.append(counts)
            quantized = ops.rvq.encode(z, codes[None], metric=self.metric).quantized
            residual = residual - self._out_of_codes(quantized, q)
        # As if every step brought as many vectors as this one.
        counts = torch.cat(found_counts).clamp(min=1) * (found / len(sample))
        self.codebooks.copy_(torch.cat(found_codes).view_as(self.codebooks))
        self.cluster_size.copy_(counts.view_as(self.cluster_size))
        if world_size() > 1:  # ranks drew different random numbers
            dist.broadcast(self.codebooks.data, 0)
            dist.broadcast(self.cluster_size, 0)
        if self.embed_sum is not None:
            self.embed_sum.copy_(self.codebooks * self.cluster_size[..., None])
        self.initialized.fill_(True)
        self._ready = True
