"""Vector quantizers that learn their codebooks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .codebooks import Codebooks, _check_choice, _check_range
from .experts import _check_sizes, _init_uniform
from .quantizer_import import read_vector_quantize_pytorch
from .quantizer_metrics import CodeUsage, code_usage

PROJECTIONS = ("shared", "per_stage")


class Quantized(NamedTuple):
    """What a quantizer returns. Q' stages were used; a VectorQuantizer has no such dimension."""

    quantized: Tensor  # [..., D], dtype as x; 0 for padding
    codes: Tensor  # [..., Q'] int32; -1 for padding
    loss: Tensor  # scalar, to be added to the training loss
    commitment_loss: Tensor  # scalar, not weighted; gradient to x
    codebook_loss: Tensor  # scalar; gradient to the codebooks with learning="gradient"
    usage: CodeUsage  # [Q', K], of this batch on this rank


class _StageProjections(nn.Module):
    """A linear layer for each stage. In one tensor, so that stages that a step leaves out have
    a gradient of 0 too: DistributedDataParallel wants one."""

    def __init__(self, num_stages: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_stages, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_stages, out_features))
        _init_uniform(self.weight, self.bias)

    def forward(self, x: Tensor, stage: int) -> Tensor:
        return F.linear(x, self.weight[stage], self.bias[stage])


class _Quantizer(Codebooks):
    """What ResidualVQ and VectorQuantizer share: projections, masks, losses."""

    def __init__(
        self,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        *,
        codebook_dim: int | None = None,
        projection: str = "shared",
        metric: str = "l2",
        learning: str = "ema",
        decay: float = 0.99,
        epsilon: float = 1e-5,
        commitment_weight: float = 0.25,
        dead_code_threshold: float = 0.1,
        kmeans_init: bool = True,
        kmeans_iters: int = 10,
        quantizer_dropout: float = 0.0,
        shared_codebook: bool = False,
        rotation_trick: bool = False,
        beam: int = 1,
        exact: bool = True,
        seed: int = 0,
    ) -> None:
        width = dim if codebook_dim is None else codebook_dim
        _check_sizes(
            dim=dim, num_quantizers=num_quantizers, codebook_size=codebook_size, codebook_dim=width
        )
        _check_choice(projection=(projection, PROJECTIONS))
        _check_range(0, commitment_weight=commitment_weight)
        _check_range(0, 1, quantizer_dropout=quantizer_dropout)
        per_stage = projection == "per_stage"
        if per_stage and (beam > 1 or shared_codebook):
            name = "beam" if beam > 1 else "shared_codebook"
            raise ValueError(f"{name} must be left out with projection='per_stage'")
        super().__init__(
            width,
            num_quantizers,
            codebook_size,
            metric=metric,
            learning=learning,
            decay=decay,
            epsilon=epsilon,
            dead_code_threshold=dead_code_threshold,
            kmeans_init=kmeans_init,
            kmeans_iters=kmeans_iters,
            shared_codebook=shared_codebook,
            rotation_trick=rotation_trick,
            beam=beam,
            exact=exact,
        )
        self.dim, self.projection, self.commitment_weight = dim, projection, commitment_weight
        self.quantizer_dropout, self.seed = float(quantizer_dropout), seed
        self._steps = 0
        self.project_in: nn.Module | None = None
        self.project_out: nn.Module | None = None
        if per_stage:
            self.project_in = _StageProjections(num_quantizers, dim, width)
            self.project_out = _StageProjections(num_quantizers, width, dim)
        elif width != dim:
            self.project_in, self.project_out = nn.Linear(dim, width), nn.Linear(width, dim)

    def extra_repr(self) -> str:
        return (
            f"{self.dim}, num_quantizers={self.num_quantizers}, codebook_size={self.codebook_size},"
            f" codebook_dim={self.codebook_dim}, projection={self.projection!r},"
            f" metric={self.metric!r}, learning={self.learning!r}"
        )

    def _quantize(self, x: Tensor, mask: Tensor | None, n_stages: int | None) -> Quantized:
        if n_stages is None and self.training and self.quantizer_dropout:
            n_stages = self._drop_stages()
        quantized, codes, errors, codebook_errors = self._look_up(x, mask, n_stages, self.training)
        valid = None if mask is None else mask.reshape(-1)
        with torch.autocast(x.device.type, enabled=False):
            if self.project_out is not None and self.projection == "shared":
                quantized = self.project_out(self._widened(quantized))
            if valid is not None:
                quantized = torch.where(valid[:, None], quantized, 0)
            commitment = self._mean(errors, valid)
            codebook = self._mean(codebook_errors, valid)
            loss = self.commitment_weight * commitment
            if self.learning == "gradient":
                loss = loss + codebook
        return Quantized(
            quantized.to(x.dtype).view(x.shape),
            codes.view(*x.shape[:-1], codes.shape[-1]),
            loss,
            commitment,
            codebook,
            code_usage(codes, self.codebook_size),
        )

    def _drop_stages(self) -> int:
        if torch.compiler.is_compiling():
            raise ValueError(
                "n_stages must be given where a quantizer with quantizer_dropout is compiled:"
                " n_stages=random_stages(step)"
            )
        self._steps += 1
        return self.random_stages(self._steps)

    def random_stages(self, step: int) -> int:
        """How many leading stages quantizer_dropout leaves at a step: the same on every rank."""
        draw = random.Random(f"{self.seed} {step}")
        if draw.random() >= self.quantizer_dropout:
            return self.num_quantizers
        return draw.randint(1, self.num_quantizers)

    def _look_up(
        self, x: Tensor, mask: Tensor | None, n_stages: int | None, learn: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_encode`, of rows. quantized is D wide where each stage projects, else C wide."""
        if x.dim() < 1 or x.shape[-1] != self.dim:
            raise ValueError(f"x must have shape [..., {self.dim}], got {list(x.shape)}")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
            raise ValueError(
                f"mask must be bool of shape {list(x.shape[:-1])}, as x without its last"
                f" dimension, got {mask.dtype} of shape {list(mask.shape)}"
            )
        n_stages = self.num_quantizers if n_stages is None else n_stages
        if not 1 <= n_stages <= self.num_quantizers:
            raise ValueError(
                f"n_stages must be from 1 to num_quantizers = {self.num_quantizers}, got {n_stages}"
            )
        if learn and self.codebooks.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                "codebooks must be float32 or float64 in training, got"
                f" {self.codebooks.dtype}: leave the quantizer in float32 and use autocast"
            )
        if learn and not self._ready and torch.compiler.is_compiling():
            raise ValueError(
                "the first training step must run before the quantizer is compiled: it sets the"
                " codebooks by k-means"
            )
        rows = x.reshape(-1, self.dim)
        valid = None if mask is None else mask.reshape(-1)
        if valid is not None:
            rows = torch.where(valid[:, None], rows, 0)  # padding may hold anything, NaN too
        with torch.autocast(x.device.type, enabled=False):
            if self.project_in is not None:
                rows = self._widened(rows)
                if self.projection == "shared":
                    rows = self.project_in(rows)
            if learn and not self._ready:
                self._initialize(rows, valid)
            if self.projection == "shared":
                return self._encode(rows, valid, 0, n_stages, learn)
            total, residual, found = torch.zeros_like(rows), rows, []
            for q in range(n_stages):
                z = self._into_codes(residual, q)
                looked_up, *rest = self._encode(z, valid, q, q + 1, learn)
                stage = self._out_of_codes(looked_up, q)
                total, residual = total + stage, residual - stage
                found.append(rest)
            codes, errors, codebook_errors = (torch.cat(t, 1) for t in zip(*found, strict=True))
            return total, codes, errors, codebook_errors

    def _into_codes(self, x: Tensor, stage: int) -> Tensor:
        return self.project_in(x, stage) if isinstance(self.project_in, _StageProjections) else x

    def _out_of_codes(self, x: Tensor, stage: int) -> Tensor:
        if isinstance(self.project_out, _StageProjections):
            return self.project_out(self._widened(x), stage)
        return x

    def _widened(self, x: Tensor) -> Tensor:
        """In the dtype of the projections, whatever autocast says."""
        assert self.project_in is not None
        return x.to(next(self.project_in.parameters()).dtype)

    def _mean(self, errors: Tensor, valid: Tensor | None) -> Tensor:
        """Mean over vectors and width, sum over stages."""
        if valid is None:
            return errors.sum() / max(len(errors) * self.codebook_dim, 1)
        kept = torch.where(valid[:, None], errors, 0)
        return kept.sum() / (valid.sum() * self.codebook_dim).clamp(min=1)

    def _decode(self, codes: Tensor) -> Tensor:
        if codes.dim() < 1 or not 1 <= codes.shape[-1] <= self.num_quantizers:
            raise ValueError(
                f"codes must have shape [..., 1 to num_quantizers = {self.num_quantizers}], got"
                f" {list(codes.shape)}"
            )
        codes, codebooks = codes.int(), self._stages(0, codes.shape[-1])
        with torch.autocast(codes.device.type, enabled=False):
            if self.project_out is None:
                return ops.rvq.decode(codes, codebooks)
            if self.projection == "shared":
                x = self.project_out(self._widened(ops.rvq.decode(codes, codebooks)))
                return torch.where((codes >= 0).any(-1, keepdim=True), x, 0)
            total = codebooks.new_zeros(*codes.shape[:-1], self.dim)
            for q, codebook in enumerate(codebooks.split(1)):
                code = codes[..., q : q + 1]
                stage = self._out_of_codes(ops.rvq.decode(code, codebook), q)
                total = total + torch.where(code >= 0, stage, 0)
            return total


class ResidualVQ(_Quantizer):
    """Residual vector quantization: each stage quantizes what the stages before it left.

    r_0 = x; stage q takes the code nearest to r_{q-1} and subtracts it; the result is the sum of
    the codes. Zeghidour et al., "SoundStream", arXiv 2107.03312. All arithmetic is float32
    (float64 for float64), also under autocast.

    In training forward also moves the codebooks, so call it once a step; in eval mode it changes
    nothing. Where torch.distributed is initialised the statistics are of all ranks and the
    codebooks the same on all.

    Args:
        dim: D.
        num_quantizers: Q, the stages.
        codebook_size: K, the codes of a stage.
        codebook_dim: C, the width of the codes; None: D.
        projection: "shared": where C is not D, one linear layer into and one out of all stages.
            "per_stage": each stage projects its residual, looks it up and projects back, as in
            arXiv 2306.06546; not with `beam` or `shared_codebook`.
        metric: "l2", or "cosine": the code at the smallest angle to the residual. The code is
            subtracted as it is. With learning="ema" all codes have length 1: right for one stage
            and vectors of that length, too long for what is left to later stages.
        learning: "ema": codes are moving averages of the residuals that chose them (arXiv
            1711.00937, appendix A.1). "gradient": they are a parameter, and `loss` moves them.
        decay, epsilon: of the moving averages; see :func:`sparsemoe.ops.rvq.ema_update`.
        commitment_weight: loss = commitment_weight * commitment_loss, and with
            learning="gradient" + codebook_loss.
        dead_code_threshold: a code that fewer vectors than this choose a step, in a moving average
            over all ranks, is replaced by a random residual of its stage. Keep it well below the
            mean, vectors a step / K. 0: never.
        kmeans_init: set the codes by k-means on at most 64 K vectors of the first training batch
            (a shared codebook: K / Q codes of what each stage sees). Run that step before
            torch.compile and before capturing a CUDA graph. False: small random codes.
        kmeans_iters: iterations of k-means.
        quantizer_dropout: share of the training steps that use a random number of leading stages,
            1 to Q; the others do not learn. forward counts its calls; under torch.compile, in a
            CUDA graph or to resume a run exactly, pass n_stages=random_stages(step).
        shared_codebook: one codebook for all stages.
        rotation_trick: gradients to x by :func:`sparsemoe.ops.rvq.rotate`; else they pass as
            they are.
        beam: above 1: search by :func:`sparsemoe.ops.rvq.beam_encode`; only with "l2".
        exact: see :func:`sparsemoe.ops.rvq.encode`.
        seed: of the numbers of stages.

    Attributes:
        codebooks: [Q, K, C]; [1, K, C] where shared, and so are the next two.
        cluster_size: [Q, K], moving average of how many vectors chose each code.
        embed_sum: [Q, K, C], moving average of their sum; None with learning="gradient".
        initialized: whether k-means is done.

    Example:
        >>> rvq = ResidualVQ(128, num_quantizers=4, codebook_size=1024)
        >>> out = rvq(encoder(audio))
        >>> loss = (decoder(out.quantized) - audio).abs().mean() + out.loss
    """

    def forward(
        self, x: Tensor, mask: Tensor | None = None, n_stages: int | None = None
    ) -> Quantized:
        """x [..., D], mask [...] bool (False: padding), the first n_stages -> Quantized.

        Padding has codes -1 and quantized 0, and takes no part in losses, statistics and
        replacements. Losses are means over vectors and width, summed over stages.
        """
        return self._quantize(x, mask, n_stages)

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None, n_stages: int | None = None) -> Tensor:
        """The codes [..., Q'] of x [..., D]. Changes nothing, in training neither."""
        codes = self._look_up(x, mask, n_stages, learn=False)[1]
        return codes.view(*x.shape[:-1], codes.shape[-1])

    def decode(self, codes: Tensor) -> Tensor:
        """[..., D] float32 of codes [..., Q'] of the first stages; -1 adds nothing."""
        return self._decode(codes)

    @classmethod
    def from_vector_quantize_pytorch(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        metric: str = "l2",
        shared_codebook: bool = False,
        **options: Any,
    ) -> ResidualVQ:
        """From the state dict of a ResidualVQ of vector-quantize-pytorch 1.32.0: the same codes.

        Sizes come from the tensors. What they do not show must be given: metric="cosine" for
        use_cosine_sim, shared_codebook, learning="gradient" for learnable_codebook, and how to
        train on (there decay is 0.8 and the commitment weight 1 by default). Raises ValueError for
        implicit neural codebooks, affine_param, vq_bridge and codebooks of several sizes. Not
        carried over, as the tensors do not show it: sampling of codes (sample_codebook_temp),
        heads, and losses that are only there.
        """
        found = read_vector_quantize_pytorch(state_dict, shared_codebook)
        _, codebook_size, width = found.state["codebooks"].shape
        weight = found.state.get("project_in.weight")
        model = cls(
            width if weight is None else weight.shape[1],
            found.num_quantizers,
            codebook_size,
            codebook_dim=width,
            metric=metric,
            shared_codebook=shared_codebook,
            **options,
        )
        if model.embed_sum is None:
            del found.state["embed_sum"]
        model.load_state_dict(found.state)
        return model


class VectorQuantizer(_Quantizer):
    """Every vector becomes one code: :class:`ResidualVQ` with one stage, and the same options.

    van den Oord et al., "Neural discrete representation learning", arXiv 1711.00937.

    Args:
        dim: D.
        codebook_size: K.
        **options: as of ResidualVQ.
    """

    def __init__(self, dim: int, codebook_size: int, **options: Any) -> None:
        super().__init__(dim, 1, codebook_size, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """As of ResidualVQ, with codes [...] and usage [K]."""
        out = self._quantize(x, mask, None)
        return out._replace(codes=out.codes[..., 0], usage=CodeUsage(out.usage.counts[0]))

    @torch.no_grad()
    def encode(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The codes [...] of x [..., D]. Changes nothing, in training neither."""
        return self._look_up(x, mask, None, learn=False)[1].view(x.shape[:-1])

    def decode(self, codes: Tensor) -> Tensor:
        """[..., D] float32 of codes [...]; -1 gives 0."""
        return self._decode(codes[..., None])
