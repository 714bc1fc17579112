"""One of two ranks: `quantizer_ranks.py RANK FOLDER` trains quantizers and stores them."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from sparsemoe import nn

AVERAGED = {
    "ema": {},
    "cosine": {"metric": "cosine"},
    "shared_codebook": {"shared_codebook": True},
    "per_stage": {"codebook_dim": 4, "projection": "per_stage"},
}
REVIVED = {
    **AVERAGED,
    "gradient": {"learning": "gradient"},
    "all_die": {"dead_code_threshold": 1e3},
}
SPLIT = (70, 30)  # of 100 vectors


def quantizer(options, **more):
    torch.manual_seed(1)
    return nn.ResidualVQ(8, 3, 15, **options, **more)


def batches(num):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(sum(SPLIT), 8, generator=generator) for _ in range(num)]


def averaged(options, rank=None):
    """Steps of the moving averages, on this rank's part or, without a rank, on all."""
    model = quantizer(options, kmeans_init=False, dead_code_threshold=0, decay=0.9)
    for x in batches(3):
        model(x if rank is None else x.split(SPLIT)[rank])
    return model.state_dict()


def revived(options, rank):
    """k-means and replaced codes, where ranks draw different random numbers."""
    model = quantizer({"dead_code_threshold": 4.0, **options}, decay=0.5)
    torch.manual_seed(10 + rank)
    states = []
    for step, x in enumerate(batches(4)):
        x = x.split(SPLIT)[rank]
        mask = torch.rand(len(x)) > 0.2
        if rank == 1 and step == 2:
            mask[:] = False
        if rank == 1 and step == 3:
            x, mask = x[:0], None
        model(x, mask)
        states.append({key: value.clone() for key, value in model.state_dict().items()})
    return states


def main(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder) / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    found = {
        "averaged": {name: averaged(options, rank) for name, options in AVERAGED.items()},
        "revived": {name: revived(options, rank) for name, options in REVIVED.items()},
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
