"""Evaluation: bits per byte, what a compressor needs for the same bytes, and plots."""

from sparsemoe.evaluate.bits import (
    Evaluation,
    bits_per_byte,
    xz_bits_per_byte,
    zstd_bits_per_byte,
)
from sparsemoe.evaluate.codec import CodecEvaluation, StageEvaluation, evaluate_codec
from sparsemoe.evaluate.plot import plot_runs

__all__ = [
    "CodecEvaluation",
    "Evaluation",
    "StageEvaluation",
    "bits_per_byte",
    "evaluate_codec",
    "plot_runs",
    "xz_bits_per_byte",
    "zstd_bits_per_byte",
]
