"""Vyra: a byte codec, whose codes are what its language model is to be made of."""

from sparsemoe.models.vyra.codec import Codec
from sparsemoe.models.vyra.codec_config import CodecConfig

__all__ = ["Codec", "CodecConfig"]
