"""A language model on bytes, with a mixture of experts in its feed-forward layers."""

from sparsemoe.models.moe_lm.config import START, VOCAB_SIZE, MoELMConfig
from sparsemoe.models.moe_lm.model import KVCache, MoELM

__all__ = ["START", "VOCAB_SIZE", "KVCache", "MoELM", "MoELMConfig"]
