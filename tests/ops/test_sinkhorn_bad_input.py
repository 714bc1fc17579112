# ruff: noqa: E501 (a table: one case a line)
"""Every wrong input gets one sentence that names the argument, what came and what must come."""

import pytest
import torch

from sparsemoe.ops.sinkhorn import sinkhorn

OPS = torch.ops.sparsemoe
f, d = torch.float32, torch.float64


def x(*size, dtype=f):
    return torch.zeros(size or (2, 6, 4), dtype=dtype)


def ones(*size, dtype=f):
    return torch.ones(size, dtype=dtype)


def bare(
    logits=None, n_iters=8, tolerance=None, temperature=1.0, rows=None, columns=None, mask=None
):
    given = x() if logits is None else logits
    return OPS.sinkhorn(given, n_iters, tolerance, temperature, rows, columns, mask)


def backward(grad=None, logits=None, n_iters=8, state=None, history=None, **options):
    given = x() if logits is None else logits
    grad = x() if grad is None else grad
    state = torch.zeros(2, 2, dtype=torch.int32) if state is None else state
    history = torch.empty(0, dtype=d) if history is None else history
    settings = {"tolerance": None, "temperature": 1.0} | options
    return OPS.sinkhorn_backward(
        grad,
        given,
        n_iters,
        settings["tolerance"],
        settings["temperature"],
        None,
        None,
        None,
        state,
        history,
    )


FORBIDDEN = x()
FORBIDDEN[1, 4] = -torch.inf

CASES = {
    "scalar": (lambda: sinkhorn(torch.tensor(1.0)), r"logits must have shape \[\.\.\., tokens, experts\], got \[\]"),
    "1-D": (lambda: sinkhorn(x(6)), r"logits must have shape \[\.\.\., tokens, experts\], got \[6\]"),
    "no experts": (lambda: sinkhorn(x(6, 0)), r"logits must have 1 to 1024 experts, got shape \[6, 0\]"),
    "1025 experts": (lambda: sinkhorn(x(3, 1025)), r"logits must have 1 to 1024 experts, got shape \[3, 1025\]"),
    "integers": (lambda: sinkhorn(x(dtype=torch.int64)), "logits must be float32, bfloat16, float16 or .* float64, got Long"),
    "n_iters": (lambda: sinkhorn(x(), 0), "n_iters must be 1 or more, got 0"),
    "n_iters below": (lambda: sinkhorn(x(), -3), "n_iters must be 1 or more, got -3"),
    "tolerance": (lambda: sinkhorn(x(), tolerance=-0.5), "tolerance must be None or finite and 0 or more, got -0.5"),
    "tolerance nan": (lambda: sinkhorn(x(), tolerance=float("nan")), "tolerance must be None or finite and 0 or more, got nan"),
    "temperature 0": (lambda: sinkhorn(x(), temperature=0.0), "temperature must be finite and above 0, got 0"),
    "temperature below": (lambda: sinkhorn(x(), temperature=-1.0), "temperature must be finite and above 0, got -1"),
    "temperature nan": (lambda: sinkhorn(x(), temperature=float("nan")), "temperature must be finite and above 0, got nan"),
    "gradient": (lambda: sinkhorn(x(), gradient="straight"), "gradient must be 'exact' or 'implicit', got 'straight'"),
    "rows shape": (lambda: sinkhorn(x(), row_marginals=ones(4)), r"row_marginals must have shape \[tokens\] = \[6\] or \[2, 6\], got \[4\]"),
    "rows of others": (lambda: sinkhorn(x(), row_marginals=ones(3, 6)), r"row_marginals must have shape \[tokens\] = \[6\] or \[2, 6\], got \[3, 6\]"),
    "columns shape": (lambda: sinkhorn(x(), col_marginals=ones(6)), r"col_marginals must have shape \[experts\] = \[4\] or \[2, 4\], got \[6\]"),
    "rows below 0": (lambda: sinkhorn(x(), row_marginals=ones(6) - 2), "row_marginals must be 0 or more, got -1"),
    "rows nan": (lambda: sinkhorn(x(), row_marginals=ones(6) * float("nan")), "row_marginals must be 0 or more, got nan"),
    "columns below 0": (lambda: sinkhorn(x(), col_marginals=torch.tensor([4.0, 2, 2, -2])), "col_marginals must be 0 or more, got -2"),
    "columns' sum": (lambda: sinkhorn(x(), col_marginals=ones(4)), "col_marginals must sum to what the rows sum to, 6, got 4"),
    "columns' sum, rows": (lambda: sinkhorn(x(), row_marginals=ones(6) / 2, col_marginals=ones(2, 4)), "col_marginals must sum to what the rows sum to, 3, got 4"),
    "columns' sum, mask": (lambda: sinkhorn(x(), col_marginals=1.5 * ones(4), mask=torch.arange(6).expand(2, 6) < 5), "col_marginals must sum to what the rows sum to, 5, got 6"),
    "forbidden": (lambda: sinkhorn(FORBIDDEN), r"logits must allow every token an expert, got only -inf in row \[1, 4\]"),
    "mask shape": (lambda: sinkhorn(x(), mask=torch.ones(2, 4, dtype=torch.bool)), r"mask must have shape \[\.\.\., tokens\] with size 6 in dimension 1, got \[2, 4\]"),
    "mask for all": (lambda: sinkhorn(x(), mask=torch.ones(6, dtype=torch.bool)), r"mask must have shape \[\.\.\., tokens\], got \[6\]"),
    "mask dtype": (lambda: sinkhorn(x(), mask=ones(2, 6)), "mask must have dtype Bool, got Float"),
    "bare rows shape": (lambda: bare(rows=ones(6)), r"row_marginals must have shape \[\.\.\., tokens\], got \[6\]"),
    "bare rows size": (lambda: bare(rows=ones(2, 5)), r"row_marginals must have shape \[\.\.\., tokens\] with size 6 in dimension 1, got \[2, 5\]"),
    "bare rows dtype": (lambda: bare(rows=ones(2, 6, dtype=d)), "row_marginals must have dtype Float, got Double"),
    "bare rows dtype, float64": (lambda: bare(x(dtype=d), rows=ones(2, 6)), "row_marginals must have dtype Double, got Float"),
    "bare columns shape": (lambda: bare(columns=ones(4)), r"col_marginals must have shape \[\.\.\., experts\], got \[4\]"),
    "bare columns size": (lambda: bare(columns=ones(3, 4)), r"col_marginals must have shape \[\.\.\., experts\] with size 2 in dimension 0, got \[3, 4\]"),
    "bare columns dtype": (lambda: bare(x(dtype=torch.bfloat16), columns=ones(2, 4, dtype=torch.bfloat16)), "col_marginals must have dtype Float, got BFloat16"),
    "backward grad shape": (lambda: backward(grad=x(2, 6, 5)), r"grad must have the logits' shape \[2, 6, 4\], got \[2, 6, 5\]"),
    "backward grad dtype": (lambda: backward(grad=x(dtype=torch.float16)), "grad must have dtype Float, got Half"),
    "backward state": (lambda: backward(state=torch.zeros(3, 2, dtype=torch.int32)), r"state must have shape \[\.\.\., 2\], got \[3, 2\]"),
    "backward state dtype": (lambda: backward(state=torch.zeros(2, 2)), "state must have dtype Int, got Float"),
    "backward history": (lambda: backward(history=x(2, 7, 4, dtype=d)), r"history must have shape \[\.\.\., n_iters, experts\] or \[0\], got \[2, 7, 4\]"),
    "backward history dtype": (lambda: backward(history=x(2, 8, 4)), "history must have dtype Double, got Float"),
    "backward n_iters": (lambda: backward(n_iters=0), "n_iters must be 1 or more, got 0"),
    "backward temperature": (lambda: backward(temperature=0.0), "temperature must be finite and above 0, got 0"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_message(name):
    call, message = CASES[name]
    with pytest.raises((RuntimeError, ValueError), match=message):
        call()


def test_what_is_right_is_not_refused():
    sinkhorn(x(), row_marginals=ones(6) / 3, col_marginals=ones(2, 4) / 2, tolerance=0.0)
    sinkhorn(FORBIDDEN, mask=torch.arange(6).expand(2, 6) != 4)
    sinkhorn(FORBIDDEN, row_marginals=(torch.arange(6) != 4).float())
    sinkhorn(FORBIDDEN, check=False)
    sinkhorn(x(), row_marginals=ones(6) - 2, check=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu():
    logits = x().cuda()
    with pytest.raises(RuntimeError, match="logits must be .* on a GPU, got float64"):
        sinkhorn(logits.double())
    with pytest.raises(RuntimeError, match="mask must be on the same device as logits"):
        sinkhorn(logits, mask=torch.ones(2, 6, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="row_marginals must be on the same device as logits"):
        sinkhorn(logits, row_marginals=ones(6))
    with pytest.raises(RuntimeError, match="grad must be on the same device as logits"):
        backward(logits=logits)
    with pytest.raises(
        ValueError, match=r"logits must allow every token an expert, .* row \[1, 4\]"
    ):
        sinkhorn(FORBIDDEN.cuda(), check=True)
    assert not sinkhorn(FORBIDDEN.cuda())[1, 4].any()  # nobody looked
