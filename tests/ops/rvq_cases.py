"""What the tests of the rvq ops share: inputs, and the exact codes to hold the ops to."""

import torch

from tests.ops.moe_cases import close, dtypes

__all__ = ["DATA", "close", "codebooks_for", "dtypes", "follow", "real", "vectors"]


def real(dtype):
    """The dtype of codebooks and errors for vectors of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def vectors(n, width, device, dtype=torch.float32):
    return torch.randn(n, width, device=device).to(dtype)


def codebooks_for(n_stages, n_codes, width, device, dtype=torch.float32):
    """Codes that get shorter from stage to stage, as trained ones do."""
    scale = 0.7 ** torch.arange(n_stages, device=device)
    return (torch.randn(n_stages, n_codes, width, device=device) * scale[:, None, None]).to(dtype)


def gaussian(n, d, k, q, device):
    return vectors(n, d, device), codebooks_for(q, k, d, device)


def clustered(n, d, k, q, device):
    """Vectors near a sum of codes."""
    codebooks = codebooks_for(q, k, d, device)
    near = sum(c[torch.randint(k, (n,), device=device)] for c in codebooks)
    return near + 0.01 * vectors(n, d, device), codebooks


def all_the_same(n, d, k, q, device):
    return vectors(n, d, device), codebooks_for(q, 1, d, device).expand(q, k, d)


def every_code_twice(n, d, k, q, device):
    codebooks = codebooks_for(q, (k + 1) // 2, d, device).repeat(1, 2, 1)[:, :k]
    return vectors(n, d, device), codebooks[:, torch.randperm(k, device=device)]


def tiny_gaps(n, d, k, q, device):
    """Codes that differ by some roundings of each other."""
    factor = 1 + 1e-6 * torch.randn(q, k, 1, device=device)
    return vectors(n, d, device), codebooks_for(q, 1, d, device) * factor


def tiny_gaps_in_a_cloud(n, d, k, q, device):
    """Groups of codes that are nearly the same."""
    x, codebooks = gaussian(n, d, k, q, device)
    twins = codebooks[:, torch.randint(k, (k,), device=device) // 4]
    return x, twins + 1e-6 * torch.randn_like(twins)


def tight_cluster(n, d, k, q, device):
    """Vectors and codes a thousandth of their length apart: |e|^2 - 2 r.e + |r|^2 would cancel."""
    codebooks = 1e-3 * codebooks_for(q, k, d, device)
    centre = torch.randn(d, device=device)
    codebooks[0] += centre
    return centre + 1e-3 * vectors(n, d, device), codebooks


def offset(n, d, k, q, device):
    """The first stage takes the offset off."""
    x, codebooks = gaussian(n, d, k, q, device)
    codebooks[0] += 1e3
    return x + 1e3, codebooks


def offset_everywhere(n, d, k, q, device):
    x, codebooks = gaussian(n, d, k, q, device)
    return x + 1e3, codebooks + 1e3


def huge(n, d, k, q, device):
    x, codebooks = gaussian(n, d, k, q, device)
    return x * 1e10, codebooks * 1e10


def tiny(n, d, k, q, device):
    x, codebooks = gaussian(n, d, k, q, device)
    return x * 1e-10, codebooks * 1e-10


def many_norms(n, d, k, q, device):
    x, codebooks = gaussian(n, d, k, q, device)
    code_scale = 10 ** (8 * torch.rand(q, k, 1, device=device) - 4)
    return x * 10 ** (8 * torch.rand(n, 1, device=device) - 4), codebooks * code_scale


def one_long_code(n, d, k, q, device):
    """A code so long that it dwarfs the others."""
    x, codebooks = gaussian(n, d, k, q, device)
    codebooks[:, k // 2] *= 1e6
    return x, codebooks


def fresh(n, d, k, q, device):
    """Codes as VQ-VAE draws them at first, short beside the vectors."""
    return vectors(n, d, device), (torch.rand(q, k, d, device=device) * 2 - 1) / k


def short_in_copies(n, d, k, q, device):
    """Codes six times each, so short that in float32 all are about as far from a vector."""
    codebooks = 3e-7 * codebooks_for(q, (k + 5) // 6, d, device).repeat(1, 6, 1)[:, :k]
    return vectors(n, d, device), codebooks[:, torch.randperm(k, device=device)]


def on_the_codes(n, d, k, q, device):
    codebooks = codebooks_for(q, k, d, device)
    return codebooks[0, torch.randint(k, (n,), device=device)], codebooks


def on_a_lattice(n, d, k, q, device):
    """Small whole numbers: many distances are equal, and none is rounded."""
    codebooks = torch.randint(-1, 2, (q, k, d), device=device).float()
    return torch.randint(-2, 3, (n, d), device=device).float(), codebooks


def shrinking(n, d, k, q, device):
    """Each stage leaves a thousandth of what it got."""
    scale = 1e-3 ** torch.arange(q, device=device)
    codebooks = torch.randn(q, k, d, device=device) * scale[:, None, None]
    return sum(c[torch.randint(k, (n,), device=device)] for c in codebooks), codebooks


DATA = [
    gaussian,
    clustered,
    all_the_same,
    every_code_twice,
    tiny_gaps,
    tiny_gaps_in_a_cloud,
    tight_cluster,
    offset,
    offset_everywhere,
    huge,
    tiny,
    many_norms,
    one_long_code,
    fresh,
    on_the_codes,
    on_a_lattice,
    shrinking,
]


def first_of_equals(codebook):
    """For each code [K, D], the lowest index with the same values."""
    _, group = (codebook + 0.0).unique(dim=0, return_inverse=True)
    index = torch.arange(len(codebook), device=codebook.device)
    first = torch.full_like(index, len(codebook)).scatter_reduce(0, group, index, "amin")
    return first[group]


def follow(x, codebooks, codes, metric="l2"):
    """Walk through the stages in float64 along the codes given.

    At each stage gives: the codes; how far the one chosen is and how far the nearest, both in
    float64; the lowest index with the chosen code's values; how long the residual is that is left;
    and by how much rounding may have displaced the residual before and after the stage.
    """
    unit = torch.finfo(real(x.dtype)).eps / 2
    residual = x.double()
    before = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for code, codebook in zip(codes.long().unbind(-1), codebooks.double(), strict=False):
        if metric == "l2":
            apart = torch.cdist(residual, codebook, compute_mode="donot_use_mm_for_euclid_dist")
        else:
            apart = -residual @ torch.nn.functional.normalize(codebook, dim=-1).T
        apart = torch.where(apart.isnan(), torch.inf, apart)
        chosen = apart.gather(1, code[:, None])[:, 0]
        residual = residual - codebook[code]
        left = residual.norm(dim=-1)
        after = before + unit * left
        yield code, chosen, apart.amin(1), first_of_equals(codebook)[code], left, before, after
        before = after
