"""The shape of Vyra's byte codec."""

from __future__ import annotations

import math
from dataclasses import dataclass

NUM_BYTES = 256


@dataclass
class CodecConfig:
    """Sizes and options of :class:`~sparsemoe.models.vyra.Codec`.

    Raises ``ValueError`` naming the field where a size is impossible.
    """

    compression_ratio: int = 8  # bytes a patch: 2, 4, 8 or 16
    context: int = 8192  # longest sequence, in bytes
    embedding_size: int = 512  # width of a byte
    hidden_size: int = 1024  # width of a patch
    encoder_layers: int = 6
    decoder_layers: int = 4
    num_attention_heads: int = 16
    intermediate_size: int = 2816  # of the SwiGLU of a layer
    dropout: float = 0.0  # on what each layer adds
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    # Quantizer: see sparsemoe.nn.ResidualVQ.
    num_quantization_stages: int = 4
    codebook_size: int = 1024
    code_dim: int = 128
    codebook_decay: float = 0.99
    commitment_weight: float = 0.05
    dead_code_share: float = 0.03  # of an even share of the vectors; 0: codes are never replaced
    quantizer_dropout: float = 0.1  # share of the steps that use a random number of stages
    rotation_trick: bool = False
    beam: int = 1  # above 1, search so many sums of codes at once
    # Quantized too early, the latents collapse: they pass as they are for some steps, and until so
    # large a share of bytes comes back right. Then k-means sets the codebooks.
    unquantized_steps: int = 150
    unquantized_accuracy: float = 0.8

    def __post_init__(self) -> None:
        at_least = {"context": 1, "embedding_size": 1, "hidden_size": 1, "encoder_layers": 1}
        at_least |= {"decoder_layers": 1, "num_attention_heads": 1, "intermediate_size": 1}
        at_least |= {"num_quantization_stages": 1, "codebook_size": 1, "code_dim": 1}
        at_least |= {
            "beam": 1,
            "unquantized_steps": 0,
            "commitment_weight": 0,
            "dead_code_share": 0,
        }
        for name, least in at_least.items():
            _require(getattr(self, name) >= least, name, getattr(self, name), f"{least} or more")
        ratio = self.compression_ratio
        _require(ratio in (2, 4, 8, 16), "compression_ratio", ratio, "2, 4, 8 or 16")
        whole = self.context % ratio == 0
        multiple = f"a multiple of compression_ratio ({ratio})"
        _require(whole, "context", self.context, multiple)
        even = self.hidden_size % (2 * self.num_attention_heads) == 0
        heads = f"a multiple of twice num_attention_heads ({2 * self.num_attention_heads})"
        _require(even, "hidden_size", self.hidden_size, heads)
        for name in ("dropout", "quantizer_dropout", "codebook_decay", "unquantized_accuracy"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")

    @property
    def patches(self) -> int:
        """Patches of the longest sequence."""
        return self.context // self.compression_ratio

    @property
    def num_strided(self) -> int:
        """Convolutions of stride 2."""
        return int(math.log2(self.compression_ratio))

    @property
    def max_code_bits(self) -> float:
        """Bits a byte of codes that are all equally likely."""
        stage = math.log2(self.codebook_size)
        return self.num_quantization_stages * stage / self.compression_ratio


def _require(condition: bool, name: str, value: object, must_be: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {value}; it must be {must_be}")
