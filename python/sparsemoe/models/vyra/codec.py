"""The codec: bytes to codes, a few for each patch of bytes, and codes back to bytes.

Nothing looks ahead of a patch: the codes of patch n depend on the bytes of patches up to n alone,
and so do the logits of its bytes on the codes of patches up to n. What is written over the codes
may therefore stream, and a language model over them does not see what it is to predict.

The encoder's latents are projected to few dimensions, normalised, and quantized by
:class:`sparsemoe.nn.ResidualVQ` in float32, also under autocast. The decoder starts from the
quantized latents, and each of its layers attends to them again.

B sequences, L bytes each, R bytes a patch, P = L / R patches, Q stages.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsemoe.models.vyra.codec_config import NUM_BYTES, CodecConfig
from sparsemoe.models.vyra.codec_search import search_codes
from sparsemoe.models.vyra.layers import Block, CausalConv
from sparsemoe.nn import Quantized, ResidualVQ

Aux = dict[str, Tensor]


class Patches(nn.Module):
    """Bytes [B, L] to patches [B, P, C]: one projection of a patch's bytes side by side, which
    learns fast, plus a chain of convolutions, which also see the end of the patch before.

    The residual stream that begins here, as the decoder's, is float32 also under autocast.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        size, eps = config.embedding_size, config.norm_eps
        self.ratio = config.compression_ratio
        self.embedding = nn.Embedding(NUM_BYTES, size)
        self.proj = nn.Linear(self.ratio * size, config.hidden_size, bias=False)
        self.first = CausalConv(size, size, stride=1)
        widths = [size] * config.num_strided + [config.hidden_size]
        self.norms = nn.ModuleList(nn.RMSNorm(width, eps=eps) for width in widths[:-1])
        self.strided = nn.ModuleList(
            CausalConv(widths[i], widths[i + 1], stride=2) for i in range(config.num_strided)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)  # [B, L, E]
        patches = self.proj(x.unflatten(1, (-1, self.ratio)).flatten(2))
        x = x + F.silu(self.first(x))
        for norm, conv in zip(self.norms, self.strided, strict=True):
            x = F.silu(conv(norm(x.float())))
        return (patches + x).float()


class Encoder(nn.Module):
    """Bytes [B, L] to latents [B, P, code_dim] float32, each of root mean square 1."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        size, self.eps = config.hidden_size, config.norm_eps
        self.patches = Patches(config)
        self.blocks = nn.ModuleList(
            Block(config, cross=False) for _ in range(config.encoder_layers)
        )
        self.norm = nn.RMSNorm(size, eps=self.eps)
        self.to_latent = nn.Linear(size, config.code_dim, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.patches(tokens)
        for block in self.blocks:
            x = block(x)
        latents = self.to_latent(self.norm(x)).float()
        return F.rms_norm(latents, latents.shape[-1:], eps=self.eps)


class Bytes(nn.Module):
    """Patches [B, P, C] to logits [B, L, 256]: a transposed convolution whose kernel and stride
    are a patch, so that no two overlap, and a projection of each byte."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        size, eps = config.embedding_size, config.norm_eps
        self.ratio = config.compression_ratio
        self.proj = nn.Linear(config.hidden_size, self.ratio * size, bias=False)
        self.norm = nn.RMSNorm(size, eps=eps)
        self.to_logits = nn.Linear(size, NUM_BYTES)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.proj(patches).unflatten(2, (self.ratio, -1)).flatten(1, 2).float()  # [B, L, E]
        return self.to_logits(self.norm(x))


class Decoder(nn.Module):
    """Quantized latents [B, P, code_dim] to logits [B, L, 256]."""

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.from_latent = nn.Linear(config.code_dim, size)
        self.memory_norm = nn.RMSNorm(size, eps=eps)
        self.blocks = nn.ModuleList(Block(config, cross=True) for _ in range(config.decoder_layers))
        self.norm = nn.RMSNorm(size, eps=eps)
        self.bytes = Bytes(config)

    def forward(self, latents: Tensor) -> Tensor:
        x = self.from_latent(latents).float()
        memory = self.memory_norm(x)
        for block in self.blocks:
            x = block(x, memory)
        return self.bytes(self.norm(x))


def _after_loading(codec: Codec, _: object) -> None:
    codec.quantizing = bool(codec.quantizer.initialized)


class Codec(nn.Module):
    """The codec.

    ``codec(tokens)`` gives the training loss, ``encode`` codes, and ``decode`` logits.
    ``quantizing`` says whether set_codebooks was called: until then forward passes latents on as
    they are, and codes mean nothing.
    """

    def __init__(self, config: CodecConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quantizer = ResidualVQ(
            config.code_dim,
            config.num_quantization_stages,
            config.codebook_size,
            decay=config.codebook_decay,
            commitment_weight=config.commitment_weight,
            quantizer_dropout=config.quantizer_dropout,
            rotation_trick=config.rotation_trick,
            beam=config.beam,
        )
        self.decoder = Decoder(config)
        self.quantizing = False
        self.register_load_state_dict_post_hook(_after_loading)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal weights of variance 1 / fan-in; matrices that write to the residual stream are
        smaller by the square root of their number, so that its variance stays near one."""
        for part, writers in (
            (self.encoder, 2 * self.config.encoder_layers),
            (self.decoder, 3 * self.config.decoder_layers),
        ):
            for name, weight in part.named_parameters():
                if weight.dim() < 2:
                    continue  # gains of norms, biases
                std = weight.shape[-1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(writers)
                if name.endswith("embedding.weight"):
                    std = 1.0
                if name.endswith("to_logits.weight"):
                    std = 0.02  # small logits: no byte is preferred at first
                nn.init.normal_(weight, std=std)

    def forward(self, tokens: Tensor, step: int | None = None) -> tuple[Tensor, Aux]:
        """The training loss of a batch. In training mode the codebooks move: call it once a batch.

        tokens  [B, L] integers 0..255; L a multiple of the compression ratio, at most
                config.context, else ValueError
        step    of the optimizer, by which quantizer_dropout draws; None: all stages

        Returns the scalar loss (mean cross-entropy in nats plus the weighted commitment loss),
        and a dict of device tensors: ``cross_entropy``, ``correct`` (the number of bytes whose
        likeliest logit is right), and where latents are quantized ``commitment_loss`` and
        ``code_counts`` [Q, K].
        """
        latents = self.encoder(self._checked(tokens))
        aux: Aux = {}
        added: Tensor | float = 0.0
        if self.quantizing:
            out = self._quantize(latents, step)
            latents, added = out.quantized, out.loss
            aux["commitment_loss"] = out.commitment_loss.detach()
            missing = self.config.num_quantization_stages - len(out.usage.counts)
            aux["code_counts"] = F.pad(out.usage.counts, (0, 0, 0, missing))
        logits = self.decoder(latents).flatten(0, 1)
        targets = tokens.flatten()
        loss = F.cross_entropy(logits.float(), targets)
        aux["cross_entropy"] = loss.detach()
        aux["correct"] = (logits.detach().argmax(-1) == targets).sum()
        return loss + added, aux

    def _quantize(self, latents: Tensor, step: int | None) -> Quantized:
        config, quantizer = self.config, self.quantizer
        even = latents.shape[:-1].numel() / config.codebook_size
        quantizer.dead_code_threshold = config.dead_code_share * even
        n_stages = config.num_quantization_stages if step is None else quantizer.random_stages(step)
        return quantizer(latents, n_stages=n_stages)

    @torch.no_grad()
    def set_codebooks(self, batches: Iterable[Tensor]) -> None:
        """Sets the first codebooks by k-means over the latents of batches as of forward. In
        training mode; from then on forward quantizes."""
        latents = [self.encoder(self._checked(tokens)) for tokens in batches]
        self._quantize(torch.cat(latents), None)
        # Moving averages as of one batch: those of all would hold the codebooks where they are.
        self.quantizer.cluster_size /= len(latents)
        self.quantizer.embed_sum /= len(latents)
        self.quantizing = True

    def encode(self, tokens: Tensor, tries: int = 0) -> Tensor:
        """Codes [B, P, Q] int32 of bytes [B, L]; ValueError where L does not fit, as in forward.

        tries  look so many times for codes that decode better where bytes come back wrong
               (:func:`~sparsemoe.models.vyra.codec_search.search_codes`); each costs as much as
               decoding; ValueError below 0
        """
        if tries < 0:
            raise ValueError(f"tries must be 0 or more, got {tries}")
        latents = self.encoder(self._checked(tokens))
        codes = self.quantizer.encode(latents)
        return search_codes(self, tokens, latents, codes, tries) if tries else codes

    def decode(self, codes: Tensor) -> Tensor:
        """Logits [B, L, 256] from codes [B, P, Q'], of the first Q' stages."""
        return self.decoder(self.quantizer.decode(codes))

    def _checked(self, tokens: Tensor) -> Tensor:
        length, ratio = tokens.shape[-1], self.config.compression_ratio
        if tokens.dim() != 2 or length % ratio or not 0 < length <= self.config.context:
            raise ValueError(
                f"tokens must have shape [batch, length], length a multiple of {ratio} from {ratio}"
                f" to {self.config.context}, got {list(tokens.shape)}"
            )
        return tokens
