"""Evaluation: bits per byte, what a compressor needs for the same bytes, and plots."""

from sparsemoe.evaluate.bits import Evaluation, bits_per_byte, xz_bits_per_byte
from sparsemoe.evaluate.plot import plot_runs

__all__ = ["Evaluation", "bits_per_byte", "plot_runs", "xz_bits_per_byte"]
