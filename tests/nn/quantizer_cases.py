"""Quantizers of every kind, for the tests."""

import pytest
import torch

from sparsemoe import nn

# one of each way of quantizing
KINDS = {
    "ema": {},
    "gradient": {"learning": "gradient"},
    "cosine": {"metric": "cosine"},
    "cosine_gradient": {"metric": "cosine", "learning": "gradient"},
    "shared_codebook": {"shared_codebook": True},
    "shared_codebook_gradient": {"shared_codebook": True, "learning": "gradient"},
    "shared_codebook_cosine": {"shared_codebook": True, "metric": "cosine"},
    "projection": {"codebook_dim": 5},
    "per_stage": {"codebook_dim": 5, "projection": "per_stage"},
    "dac": {
        "codebook_dim": 5,
        "projection": "per_stage",
        "metric": "cosine",
        "learning": "gradient",
    },
    "rotation": {"rotation_trick": True},
    "beam": {"beam": 4},
}
kinds = pytest.mark.parametrize("kind", KINDS)


def make(device, **options):
    settings = {"dim": 12, "num_quantizers": 3, "codebook_size": 16, **options}
    return nn.ResidualVQ(**settings).to(device)


def trained(device, **options):
    model = make(device, **options)
    model(torch.randn(300, 12, device=device))
    return model


def clone_state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def changed(model, before):
    return {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
