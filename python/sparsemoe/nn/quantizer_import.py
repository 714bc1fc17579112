"""Reads the weights of other packages' quantizers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

_CODEBOOK = re.compile(r"layers\.(\d+)\._codebook\.(embed|embed_avg|cluster_size|initted)")
_PROJECTION = re.compile(r"project_(in|out)\.(weight|bias)")


class Imported(NamedTuple):
    """The state of a ResidualVQ, and its number of stages, which a shared codebook hides."""

    state: dict[str, Tensor]
    num_quantizers: int


def read_vector_quantize_pytorch(
    state_dict: Mapping[str, Tensor], shared_codebook: bool
) -> Imported:
    """See :meth:`sparsemoe.nn.ResidualVQ.from_vector_quantize_pytorch`."""
    layers: dict[int, dict[str, Tensor]] = {}
    state: dict[str, Tensor] = {}
    for key, tensor in state_dict.items():
        if match := _CODEBOOK.fullmatch(key):
            layers.setdefault(int(match[1]), {})[match[2]] = tensor
        elif _PROJECTION.fullmatch(key):
            state[key] = tensor
        else:
            raise ValueError(
                "state_dict must be of a ResidualVQ of vector-quantize-pytorch with plain"
                f" codebooks, got the entry {key!r}"
            )
    stages = [layers.get(q, {}) for q in range(max(1, len(layers)))]
    for name in ("embed", "embed_avg", "cluster_size"):
        shapes = [list(stage[name].shape) if name in stage else None for stage in stages]
        if None in shapes or any(shape != shapes[0] for shape in shapes):
            raise ValueError(
                f"state_dict must hold layers.N._codebook.{name} for every N, all of one shape,"
                f" got shapes {shapes}"
            )
    num_quantizers = len(stages)
    if shared_codebook:
        if any(not torch.equal(stage["embed"], stages[0]["embed"]) for stage in stages):
            raise ValueError(
                "state_dict must hold one codebook for all stages with shared_codebook=True, got"
                " different ones"
            )
        stages = stages[:1]
    state["codebooks"] = torch.cat([stage["embed"] for stage in stages])
    state["cluster_size"] = torch.cat([stage["cluster_size"] for stage in stages])
    state["embed_sum"] = torch.cat([stage["embed_avg"] for stage in stages])
    state["initialized"] = torch.tensor(all(bool(s.get("initted", True)) for s in stages))
    return Imported(state, num_quantizers)
