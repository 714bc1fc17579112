"""Seconds that the first forward and backward pass of a layer takes in a new process, once torch
itself has run something: python -m bench.first_call"""

from __future__ import annotations

import torch
from torch import nn

from bench import timing
from sparsemoe.nn import MoE


def forward_backward(layer: nn.Module) -> None:
    x = torch.ones(1024, 2048, device=timing.DEVICE, dtype=torch.bfloat16, requires_grad=True)
    y = layer(x)
    (y if isinstance(y, torch.Tensor) else y[0]).float().sum().backward()


def main() -> None:
    options = {"device": timing.DEVICE, "dtype": torch.bfloat16}
    torch_layer = nn.Linear(2048, 2048, **options)
    layer = MoE(2048, 768, num_experts=32, top_k=8).to(**options)
    forward_backward(torch_layer)
    start = timing.synchronized_clock()
    forward_backward(layer)
    print(f"{timing.synchronized_clock() - start:.3f}")


if __name__ == "__main__":
    main()
