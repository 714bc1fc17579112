"""What the tests of the moe ops share."""

import torch
from torch.testing import assert_close

# Sizes around the borders of lanes, packs, warps and tiles, and the empty one.
TOKENS = [0, 1, 2, 31, 33, 257]
EXPERTS = [1, 2, 3, 8, 31, 32, 33, 64, 65, 128, 200, 256, 300, 1024]
WIDTHS = [1, 3, 8, 31, 40, 64, 129, 520]
HALVES = [torch.bfloat16, torch.float16]

# Largest relative difference to the reference, by dtype of the values.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def dtypes(device):
    return [torch.float32, *HALVES] + ([torch.float64] if device == "cpu" else [])


def close(actual, expected, dtype=None, nan=False):
    tolerance = TOLERANCE[dtype or actual.dtype]
    assert_close(actual, expected.to(actual), rtol=tolerance, atol=tolerance, equal_nan=nan)


def equal_plans(actual, expected):
    for name, a, b in zip(actual._fields, actual, expected, strict=True):
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), f"{name}: {a} instead of {b}"


def distinct_logits(n_tokens, n_experts, device, dtype=torch.float32):
    """Logits no two of which are close in a row, so that rounding cannot change a choice."""
    order = torch.rand(n_tokens, n_experts, device=device).argsort(-1)
    return (order.to(torch.float32) * (6.0 / n_experts) - 3).to(dtype)


def routed(n_tokens, n_experts, top_k, device, skew=0.0):
    """experts [T, k] (distinct in a row) and weights."""
    logits = torch.randn(n_tokens, n_experts, device=device)
    logits[:, 0] += skew
    weights, experts = logits.softmax(-1).topk(top_k, dim=-1)
    return experts.int(), weights
