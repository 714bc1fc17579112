"""Modules made of the ops."""

from .experts import Experts, SharedExperts
from .moe import MoE, Routing
from .routers import ExpertChoiceRouter, RouterOutput, TopKRouter

__all__ = [
    "ExpertChoiceRouter",
    "Experts",
    "MoE",
    "RouterOutput",
    "Routing",
    "SharedExperts",
    "TopKRouter",
]
