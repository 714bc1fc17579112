import pytest
import torch

from sparsemoe.ops import moe
from sparsemoe.reference import moe as reference
from tests.ops.moe_cases import EXPERTS, TOKENS, close, dtypes


def check_balance(logits, counts, mask=None):
    actual_in, expected_in = (logits.detach().clone().requires_grad_() for _ in range(2))
    actual = moe.load_balance_loss(actual_in, counts, mask)
    expected = reference.load_balance_loss(expected_in, counts, mask)
    close(actual, expected)
    (actual * 3).backward()
    (expected * 3).backward()
    close(actual_in.grad, expected_in.grad)
    scale = expected_in.grad.abs().max() if logits.numel() else 0
    if scale:
        close((actual_in.grad / scale).float(), (expected_in.grad / scale).float(), logits.dtype)


@pytest.mark.parametrize("n_experts", EXPERTS)
def test_load_balance_loss(device, n_experts):
    for n_tokens in TOKENS:
        counts = torch.randint(0, 50, (n_experts,), device=device, dtype=torch.int32)
        check_balance(torch.randn(n_tokens, n_experts, device=device), counts)
        check_balance(
            torch.randn(n_tokens, n_experts, device=device),
            counts,
            torch.rand(n_tokens, device=device) > 0.4,
        )


def test_load_balance_loss_of_every_dtype(device):
    counts = torch.randint(0, 9, (20,), device=device, dtype=torch.int32)
    for dtype in dtypes(device):
        check_balance(torch.randn(300, 20, device=device).to(dtype), counts)


def test_load_balance_loss_of_nothing(device):
    counts = torch.zeros(4, device=device, dtype=torch.int32)
    mask = torch.zeros(5, dtype=torch.bool, device=device)
    check_balance(torch.randn(5, 4, device=device), counts, mask)


def test_perfect_balance_is_one(device):
    loss = moe.load_balance_loss(
        torch.zeros(64, 8, device=device), torch.full((8,), 5, dtype=torch.int32, device=device)
    )
    close(loss, torch.tensor(1.0))


@pytest.mark.parametrize("n_tokens", [0, 1, 33, 5000])
def test_router_z_loss(device, n_tokens):
    for dtype in [torch.float32] + ([torch.float64] if device == "cpu" else []):
        for mask in (None, torch.rand(n_tokens, device=device) > 0.5):
            values = torch.randn(n_tokens, device=device, dtype=dtype)
            actual_in, expected_in = (values.clone().requires_grad_() for _ in range(2))
            actual = moe.router_z_loss(actual_in, mask)
            expected = reference.router_z_loss(expected_in, mask)
            close(actual, expected)
            actual.backward()
            expected.backward()
            close(actual_in.grad * max(n_tokens, 1), expected_in.grad * max(n_tokens, 1))


def test_gradients_in_float64():
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([3, 0, 4, 1, 4], dtype=torch.int32)
    mask = torch.tensor([1, 1, 0, 1, 1, 0], dtype=torch.bool)
    assert torch.autograd.gradcheck(lambda x: moe.load_balance_loss(x, counts, mask), logits)
    lse = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: moe.router_z_loss(x, mask), lse)


@pytest.mark.parametrize("n_experts", [1, 5, 1024])
def test_update_expert_bias(device, n_experts):
    counts = torch.randint(0, 6, (n_experts,), device=device, dtype=torch.int32)
    bias = torch.randn(n_experts, device=device)
    expected = reference.update_expert_bias_(bias.clone(), counts, 0.01)
    assert moe.update_expert_bias_(bias, counts, 0.01) is bias
    close(bias, expected)
    still = moe.update_expert_bias_(torch.zeros(4, device=device), counts.new_zeros(4), 0.1)
    assert (still == 0).all()


def test_the_bias_balances_a_skewed_router(device):
    logits = torch.randn(2000, 8, device=device) + torch.linspace(-2, 2, 8, device=device)
    bias = torch.zeros(8, device=device)
    for step in range(400):
        counts = moe.plan(moe.gate(logits, 2, scoring="sigmoid", bias=bias).experts, 8).counts
        if step == 0:
            assert counts.max() > 2 * counts.float().mean()
        moe.update_expert_bias_(bias, counts, 0.004)
    assert counts.max() < 1.15 * counts.float().mean()
