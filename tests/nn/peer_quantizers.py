"""Quantizers of vector-quantize-pytorch, trained for some steps.

`python tests/nn/peer_quantizers.py` writes them, their inputs and codes to data/, so that reading
them is tested where that package is not installed.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

STORED = Path(__file__).parent / "data" / "vector_quantize_pytorch_1_32_0.safetensors"

PEER_OPTIONS = {
    "l2": {"kmeans_init": True},
    "cosine": {"use_cosine_sim": True, "kmeans_init": True},
    "shared": {"shared_codebook": True},
    "projection": {"codebook_dim": 4, "kmeans_init": True},
    "learnable": {"learnable_codebook": True, "ema_update": False},
}
OUR_OPTIONS = {
    "l2": {},
    "cosine": {"metric": "cosine"},
    "shared": {"shared_codebook": True},
    "projection": {},
    "learnable": {"learning": "gradient"},
}


def trained_peer(name):
    """A dict of tensors: state/..., x [N, 6], codes [N, 3], quantized [N, 6] and, of one more
    training step on x, codebooks_after [3, 8, width]."""
    from vector_quantize_pytorch import ResidualVQ

    torch.manual_seed(0)
    model = ResidualVQ(dim=6, num_quantizers=3, codebook_size=8, **PEER_OPTIONS[name])
    for _ in range(5):
        model(torch.randn(1, 256, 6))
    x = torch.randn(1, 32, 6)
    tensors = {f"state/{key}": value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        quantized, codes, _ = model.eval()(x)
        model.train()(x)
    tensors |= {"x": x[0], "codes": codes[0].int(), "quantized": quantized[0]}
    return tensors | {"codebooks_after": model.codebooks.detach()}


def stored_peer(name):
    stored = load_file(STORED).items()
    return {key.split("/", 1)[1]: value for key, value in stored if key.split("/")[0] == name}


def main():
    tensors = {}
    for name in PEER_OPTIONS:
        tensors |= {f"{name}/{key}": value for key, value in trained_peer(name).items()}
    save_file({key: value.contiguous() for key, value in tensors.items()}, STORED)


if __name__ == "__main__":
    main()
