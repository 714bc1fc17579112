"""Seconds that the first forward and backward pass of a layer takes in a new process, once torch
itself has run something: python -m bench.first_call"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import timing
from sparsemoe.nn import MoE


def forward_backward(layer: Callable[[Tensor], Tensor]) -> None:
    x = torch.ones(1024, 2048, device=timing.DEVICE, dtype=torch.bfloat16, requires_grad=True)
    layer(x).float().sum().backward()


def main() -> None:
    options = {"device": timing.DEVICE, "dtype": torch.bfloat16}
    torch_layer = nn.Linear(2048, 2048, **options)
    moe = MoE(2048, 768, num_experts=32, top_k=8).to(**options)
    forward_backward(torch_layer)
    start = timing.synchronized_clock()
    forward_backward(lambda x: moe(x)[0])
    print(f"{timing.synchronized_clock() - start:.3f}")


if __name__ == "__main__":
    main()
