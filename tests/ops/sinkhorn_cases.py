"""What the tests of the sinkhorn op share: inputs, and the float64 reference to hold it to."""

import torch
from torch.testing import assert_close

from sparsemoe.ops.sinkhorn import sinkhorn
from sparsemoe.reference.sinkhorn import sinkhorn as reference
from tests.ops.moe_cases import dtypes

__all__ = [
    "PLAN",
    "TRAPS",
    "check",
    "check_gradient",
    "dtypes",
    "marginals",
    "real",
    "reference",
    "wide",
]

INF = torch.inf

# Largest differences to the float64 reference, by the dtype that the op computes in.
PLAN = {("cpu", torch.float32): 1e-6, ("cpu", torch.float64): 1e-11, ("cuda", torch.float32): 2e-5}
SCALING = {
    ("cpu", torch.float32): 1e-5,
    ("cpu", torch.float64): 1e-11,
    ("cuda", torch.float32): 1e-4,
}
# Of gradients, of the largest: by the dtype of the logits.
GRADIENT = {
    ("cpu", torch.float32): 1e-5,
    ("cpu", torch.float64): 1e-9,
    ("cuda", torch.float32): 1e-4,
    **{(device, torch.bfloat16): 4e-3 for device in ("cpu", "cuda")},
    **{(device, torch.float16): 6e-4 for device in ("cpu", "cuda")},
}


def real(dtype):
    """The dtype of plans and marginals for logits of this dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def wide(options):
    """The options as the float64 reference takes them."""
    return {
        name: value.double() if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in options.items()
    }


def marginals(shape, device):
    """Row and column marginals of the same sums, for logits of this shape."""
    rows = torch.rand(shape[:-1], device=device) + 0.1
    columns = torch.rand((*shape[:-2], shape[-1]), device=device) + 0.1
    return rows, columns * (rows.sum(-1, keepdim=True) / columns.sum(-1, keepdim=True))


def check(logits, n_iters=8, **options):
    """Everything that the op returns against the float64 reference. Returns the op's."""
    found = sinkhorn(logits, n_iters, return_scalings=True, check=False, **options)
    expected = reference(logits.double(), n_iters, return_scalings=True, **wide(options))
    kind = logits.device.type, real(logits.dtype)
    for name, tensor in found._asdict().items():
        assert tensor.dtype == (torch.int32 if name == "iterations" else kind[1]), name
        assert tensor.shape == getattr(expected, name).shape, name
    assert_close(found.plan.double(), expected.plan, rtol=0, atol=PLAN[kind])
    for name in ("log_u", "log_v"):
        a, b = getattr(found, name).double(), getattr(expected, name)
        assert_close(
            a, b, rtol=SCALING[kind], atol=SCALING[kind], msg=lambda m, n=name: f"{n}: {m}"
        )
    assert_close(found.error.double(), expected.error, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.iterations, expected.iterations)
    check_marginals(found.plan.double(), expected, wide(options))
    return found


def check_marginals(plan, expected, options):
    """Rows sum to r, and columns are no further from c than the reference's."""
    rows = plan.new_ones(plan.shape[:-1])
    if options.get("row_marginals") is not None:
        rows = options["row_marginals"].expand_as(rows)
    if options.get("mask") is not None:
        rows = rows * options["mask"]
    columns = options.get("col_marginals")
    if columns is None:
        columns = (rows.sum(-1, keepdim=True) / plan.shape[-1]).expand_as(plan.sum(-2))
    taking_part = expected.log_u > -INF  # a row in which all is forbidden sums to 0
    assert_close(plan.sum(-1), rows * taking_part, rtol=0, atol=1e-5)
    assert not plan[~taking_part].any()
    apart = (plan.sum(-2) - columns).abs().sum(-1) / rows.sum(-1).clamp(min=1e-30)
    assert (apart <= expected.error + 1e-5).all()


def check_gradient(logits, n_iters=8, call=None, **options):
    """The gradient against autograd through the float64 reference. Returns the op's."""
    leaf = logits.detach().clone().requires_grad_()
    same = logits.detach().double().requires_grad_()
    if call is None:
        found = sinkhorn(leaf, n_iters, check=False, **options)
    else:
        found = call(leaf, n_iters, **options)
    expected = reference(same, n_iters, **wide(options))
    grad = torch.randn_like(found)
    found.backward(grad)
    expected.backward(grad.double())
    assert leaf.grad.dtype == logits.dtype and leaf.grad.shape == logits.shape
    # Where the plan hardly moves at all, rounding of what cancels is left.
    largest = same.grad.abs().max().clamp(min=0.1).item() if logits.numel() else 1.0
    bound = GRADIENT[logits.device.type, logits.dtype] * largest
    assert_close(leaf.grad.double(), same.grad, rtol=0, atol=bound)
    return leaf.grad


def ordinary(shape, device):
    return torch.randn(shape, device=device)


def skewed_by_5(shape, device):
    return ordinary(shape, device) + 5 * torch.randn(shape[-1], device=device)


def skewed_by_10(shape, device):
    return ordinary(shape, device) + 10 * torch.randn(shape[-1], device=device)


def all_at_minus_15(shape, device):
    return ordinary(shape, device) - 15


def all_at_minus_100(shape, device):
    return ordinary(shape, device) - 100


def one_of_90(shape, device):
    logits = ordinary(shape, device)
    logits[..., 0, 0] = 90
    return logits


def one_column_far_below(shape, device):
    """So far that its share of the first rows is below every float32."""
    logits = ordinary(shape, device)
    logits[..., 1] -= 120
    return logits


def some_forbidden(shape, device):
    logits = ordinary(shape, device)
    logits[torch.rand(shape, device=device) < 0.3] = -INF
    logits[..., -1] = 0  # no row without
    return logits


def a_column_forbidden(shape, device):
    logits = some_forbidden(shape, device)
    logits[..., 1] = -INF
    return logits


def rows_forbidden(shape, device):
    logits = ordinary(shape, device)
    logits[..., ::3, :] = -INF
    return logits


def random_to_10000(shape, device):
    return (torch.rand(shape, device=device) - 0.5) * 2e4


def a_column_at_10000(shape, device):
    logits = ordinary(shape, device)
    logits[..., 1] += 1e4
    return logits


def a_column_at_minus_10000(shape, device):
    logits = ordinary(shape, device)
    logits[..., 1] -= 1e4
    return logits


def blocks_apart(shape, device):
    """Two groups of tokens that each all but forbid the other's experts."""
    logits = ordinary(shape, device)
    logits[..., ::2, ::2] -= 60
    logits[..., 1::2, 1::2] -= 60
    return logits


TRAPS = [
    ordinary,
    skewed_by_5,
    skewed_by_10,
    all_at_minus_15,
    all_at_minus_100,
    one_of_90,
    one_column_far_below,
    some_forbidden,
    a_column_forbidden,
    rows_forbidden,
    random_to_10000,
    a_column_at_10000,
    a_column_at_minus_10000,
    blocks_apart,
]
