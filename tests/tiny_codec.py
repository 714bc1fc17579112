"""A codec small enough that a test trains it in seconds."""

from sparsemoe.models.vyra import CodecConfig
from sparsemoe.train.config import CodecRunConfig, DataConfig, TrainConfig
from tests.tiny_lm import TRAIN

SIZES = {
    "context": 64,
    "embedding_size": 16,
    "hidden_size": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "num_quantization_stages": 2,
    "codebook_size": 32,
    "code_dim": 16,
    "unquantized_steps": 3,
    "unquantized_accuracy": 0.0,
}
OVERRIDES = [f"model.{name}={size}" for name, size in SIZES.items()]


def tiny_codec(**changes) -> CodecConfig:
    return CodecConfig(**{**SIZES, **changes})


def tiny_codec_run(model: dict | None = None, **train) -> CodecRunConfig:
    settings = TrainConfig(**{**TRAIN, **train})
    return CodecRunConfig(tiny_codec(**(model or {})), DataConfig(), settings)
