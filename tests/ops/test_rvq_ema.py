"""ema_update against the reference, on one process and on two."""

import pytest
import torch
import torch.distributed as dist

from sparsemoe.ops import rvq
from sparsemoe.reference import rvq as reference
from tests.ops.rvq_cases import close, codebooks_for, dtypes, real, vectors


def state(n_stages, n_codes, width, device, dtype=torch.float32):
    """codebooks, cluster_size, embed_sum."""
    codebooks = codebooks_for(n_stages, n_codes, width, device, dtype)
    size = torch.rand(n_stages, n_codes, device=device, dtype=dtype) * 3 + 0.1
    return codebooks, size, codebooks * size[..., None]


@pytest.mark.parametrize(
    "n, width, n_codes, n_stages", [(0, 8, 7, 2), (1, 1, 1, 1), (65, 31, 7, 3), (300, 128, 40, 4)]
)
def test_update(device, n, width, n_codes, n_stages):
    for dtype in dtypes(device):
        ours = state(n_stages, n_codes, width, device, real(dtype))
        theirs = [t.double() for t in ours]
        before = [t.clone() for t in ours]
        x = vectors(n, width, device, dtype)
        codes = torch.randint(-1, n_codes, (n, n_stages), device=device).int()
        sums = reference.code_sums(x.double(), codes, n_codes, theirs[0])
        found = rvq.ema_update(*ours, x, codes, decay=0.9, epsilon=1e-3)
        reference.ema_update(*theirs, x.double(), codes, 0.9, 1e-3)
        for a, b, old in zip(ours, theirs, before, strict=True):
            close(a, b)
            assert n < 2 or not torch.equal(a, old)
        close(found[0], sums[1])
        close(found[1], sums[0])


def test_stages_past_the_codes_stay(device):
    ours = state(4, 9, 12, device)
    before = [t.clone() for t in ours]
    x = vectors(50, 12, device).view(5, 10, 12)
    codes = rvq.encode(x, ours[0], n_stages=2).codes
    counts, sums = rvq.ema_update(*ours, x, codes)
    assert counts.shape == (2, 9) and sums.shape == (2, 9, 12) and counts.sum() == 100
    for a, old in zip(ours, before, strict=True):
        assert torch.equal(a[2:], old[2:]) and not torch.equal(a[:2], old[:2])


def test_no_decay_gives_the_mean_and_full_decay_nothing_new(device):
    codebooks, size, total = state(1, 4, 6, device)
    x = vectors(40, 6, device)
    codes = torch.arange(40, device=device).remainder(4)[:, None].int()
    rvq.ema_update(codebooks, size, total, x, codes, decay=0.0)
    close(codebooks[0], torch.stack([x[j::4].mean(0) for j in range(4)]))
    kept = codebooks.clone(), size.clone(), total.clone()
    rvq.ema_update(codebooks, size, total, x + 9, codes, decay=1.0)
    for a, b in zip((codebooks, size, total), kept, strict=True):
        close(a, b)


def test_it_asks_for_no_gradient(device):
    codebooks, size, total = state(2, 5, 6, device)
    codebooks.requires_grad_()
    x = vectors(30, 6, device).requires_grad_()
    counts, sums = rvq.ema_update(codebooks, size, total, x, rvq.encode(x, codebooks).codes)
    assert not any(t.requires_grad for t in (counts, sums, size, total))


def test_repeated_updates_find_the_clusters(device):
    centres = 5 * vectors(8, 16, device)
    x = centres[torch.arange(800, device=device) % 8] + 0.1 * vectors(800, 16, device)
    codebooks = x[None, :8].clone()
    size, total = torch.ones(1, 8, device=device), codebooks.clone()
    for _ in range(30):
        found = rvq.encode(x, codebooks)
        rvq.ema_update(codebooks, size, total, x, found.codes, decay=0.8)
    means = torch.stack([x[j::8].mean(0) for j in range(8)])
    assert (codebooks[0] - means).abs().max() < 0.02


def one_of_two(rank, store, x, codes, parts):
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    half = slice(rank, None, 2)
    parts = [t.clone() for t in parts]  # the processes share the memory of what they are given
    found = rvq.ema_update(*parts, x[half], codes[half])
    torch.save((*parts, *found), f"{store}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_are_as_one(tmp_path):
    parts = state(3, 10, 12, "cpu")
    x = vectors(101, 12, "cpu")
    codes = rvq.encode(x, parts[0]).codes
    store = tmp_path / "store"
    torch.multiprocessing.spawn(one_of_two, (str(store), x, codes, parts), nprocs=2)
    results = [torch.load(f"{store}.{rank}") for rank in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    alone = (*parts, *rvq.ema_update(*parts, x, codes))
    for a, b in zip(results[0], alone, strict=True):
        close(a, b)
