"""Modules made of the ops."""

from .experts import Experts, SharedExperts
from .moe import MoE, Routing
from .quantizer_metrics import CodeUsage, code_usage
from .quantizers import Quantized, ResidualVQ, VectorQuantizer
from .routers import ExpertChoiceRouter, RouterOutput, TopKRouter
from .sinkhorn_router import SinkhornRouter

__all__ = [
    "CodeUsage",
    "ExpertChoiceRouter",
    "Experts",
    "MoE",
    "Quantized",
    "ResidualVQ",
    "RouterOutput",
    "Routing",
    "SharedExperts",
    "SinkhornRouter",
    "TopKRouter",
    "VectorQuantizer",
    "code_usage",
]
