import copy
import io

import pytest
import torch

from sparsemoe import nn
from sparsemoe.reference import rvq as reference
from tests.nn.quantizer_cases import KINDS, changed, clone_state, kinds, make, trained


@kinds
def test_forward_backward_and_shapes(device, kind):
    model = make(device, **KINDS[kind])
    x = torch.randn(4, 50, 12, device=device, requires_grad=True)
    out = model(x)
    assert out.quantized.shape == x.shape and out.quantized.dtype == x.dtype
    assert out.codes.shape == (4, 50, 3) and out.codes.dtype == torch.int32
    assert out.usage.counts.shape == (3, 16) and (out.usage.counts.sum(-1) == 200).all()
    ((out.quantized - x.detach()).square().mean() + out.loss).backward()
    for name, tensor in [("x", x), *model.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all(), name
        assert tensor.grad.abs().sum() > 0, name


@kinds
def test_decode_gives_quantized_and_encode_the_codes(device, kind):
    model = trained(device, **KINDS[kind])
    before = clone_state(model)
    x = torch.randn(4, 50, 12, device=device)
    codes = model.encode(x)  # in training too without a trace
    assert not changed(model, before)
    model.eval()
    out = model(x)
    assert not changed(model, before)
    assert torch.equal(out.codes, codes)
    torch.testing.assert_close(model.decode(codes), out.quantized)
    first = model(x, n_stages=2)
    torch.testing.assert_close(model.decode(first.codes), first.quantized)
    if kind != "beam":
        assert torch.equal(first.codes, codes[..., :2])


def test_against_the_reference(device):
    model = trained(device, commitment_weight=0.5).eval()
    x = torch.randn(7, 12, device=device, requires_grad=True)
    out = model(x)
    expected = reference.encode(x.detach(), model.codebooks)
    assert torch.equal(out.codes, expected.codes)
    torch.testing.assert_close(out.quantized, expected.quantized)
    loss = expected.errors.mean(0).sum() / 12
    torch.testing.assert_close(out.commitment_loss, loss)
    torch.testing.assert_close(out.codebook_loss, loss)
    torch.testing.assert_close(out.loss, 0.5 * loss)
    (gradient,) = torch.autograd.grad(out.quantized.sum(), x)
    assert torch.equal(gradient, torch.ones_like(x))  # straight through


@pytest.mark.parametrize("commitment_weight", [0.0, 0.25])
@pytest.mark.parametrize("shared", [False, True])
def test_commitment_and_codebook_losses_are_weighed_apart(device, commitment_weight, shared):
    model = trained(
        device, learning="gradient", commitment_weight=commitment_weight, shared_codebook=shared
    ).eval()
    x = torch.randn(40, 12, device=device, requires_grad=True)
    grad_x, grad_codebooks = torch.autograd.grad(model(x).loss, [x, model.codebooks])
    codes = model.encode(x)
    codebooks = model.codebooks.detach().clone().requires_grad_()
    stages = codebooks.expand(3, -1, -1)
    y = x.detach().clone().requires_grad_()
    commitment = reference.given_codes(y, stages.detach(), codes).errors.mean(0).sum() / 12
    codebook = reference.given_codes(y.detach(), stages, codes).errors.mean(0).sum() / 12
    (expected,) = torch.autograd.grad(commitment_weight * commitment, y)
    torch.testing.assert_close(grad_x, expected)
    torch.testing.assert_close(grad_codebooks, torch.autograd.grad(codebook, codebooks)[0])
    assert grad_codebooks.abs().sum() > 0


def test_each_stage_projects(device):
    """The loop of DAC, arXiv 2306.06546, written out."""
    model = trained(device, **KINDS["dac"]).eval()
    x = torch.randn(20, 12, device=device)
    enter, leave = model.project_in, model.project_out
    residual, total, codes = x, torch.zeros_like(x), []
    for q in range(3):
        z = residual @ enter.weight[q].T + enter.bias[q]
        code = reference.nearest(z, model.codebooks[q], "cosine")
        stage = model.codebooks[q][code] @ leave.weight[q].T + leave.bias[q]
        residual, total = residual - stage, total + stage
        codes.append(code)
    out = model(x)
    assert torch.equal(out.codes, torch.stack(codes, -1).int())
    torch.testing.assert_close(out.quantized, total)


@kinds
def test_padding_takes_no_part(device, kind):
    mask = torch.rand(4, 60, device=device) > 0.4
    x = torch.randn(4, 60, 12, device=device)
    x[~mask] = float("nan")
    model = trained(device, dead_code_threshold=0, **KINDS[kind])
    alone = copy.deepcopy(model)
    padded = x.clone().requires_grad_()
    out = model(padded, mask)
    (out.loss + out.quantized.square().sum()).backward()
    assert (out.codes[~mask] == -1).all() and (out.quantized[~mask] == 0).all()
    assert (padded.grad[~mask] == 0).all()
    kept = x[mask].clone().requires_grad_()
    expected = alone(kept)
    (expected.loss + expected.quantized.square().sum()).backward()
    assert torch.equal(out.codes[mask], expected.codes)
    torch.testing.assert_close(out.quantized[mask], expected.quantized)
    torch.testing.assert_close(padded.grad[mask], kept.grad)
    for a, b in [(out.loss, expected.loss), (out.codebook_loss, expected.codebook_loss)]:
        torch.testing.assert_close(a, b)
    assert torch.equal(out.usage.counts, expected.usage.counts)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, alone.state_dict()[name], msg=name)
    assert (model.decode(out.codes)[~mask] == 0).all()


def test_batches_of_padding_or_nothing(device):
    model = make(device)
    nothing = torch.zeros(8, dtype=torch.bool, device=device)
    for x, mask in [(torch.randn(8, 12, device=device), nothing), (torch.zeros(0, 12), None)]:
        before = clone_state(model)
        out = model(x.to(device), mask)
        assert out.loss == 0 and out.usage.counts.sum() == 0
        assert "initialized" not in changed(model, before)  # k-means waits for vectors
    model(torch.randn(300, 12, device=device))
    assert model.initialized
    model(torch.randn(8, 12, device=device), nothing)
    model(torch.zeros(0, 12, device=device))
    assert model.codebooks.isfinite().all()


@pytest.mark.parametrize("kind", ["ema", "gradient", "per_stage"])
def test_dropped_stages_do_not_learn(device, kind):
    model = trained(device, quantizer_dropout=1.0, **KINDS[kind])
    before = clone_state(model)
    x = torch.randn(50, 12, device=device, requires_grad=True)
    out = model(x, n_stages=2)
    assert out.codes.shape == (50, 2) and out.usage.counts.shape == (2, 16)
    (out.loss + out.quantized.square().sum()).backward()
    for name in ("codebooks", "cluster_size"):
        assert torch.equal(getattr(model, name)[2], before[name][2])
    assert "cluster_size" in changed(model, before)
    for name, parameter in model.named_parameters():
        assert (parameter.grad[2] == 0).all() and parameter.grad[1].abs().sum() > 0, name


def test_number_of_stages(device):
    model = trained(device, quantizer_dropout=1.0)
    x = torch.randn(10, 12, device=device)
    drawn = [model(x).codes.shape[-1] for _ in range(40)]
    assert set(drawn) == {1, 2, 3}
    again = make(device, quantizer_dropout=1.0)
    assert drawn == [again.random_stages(step) for step in range(2, 42)]
    assert drawn != [
        make(device, quantizer_dropout=1.0, seed=1).random_stages(s) for s in range(40)
    ]
    half = make(device, quantizer_dropout=0.5)
    whole = sum(half.random_stages(step) == 3 for step in range(300)) / 300
    assert 0.5 < whole < 0.85  # 1/2 + 1/2 * 1/3
    assert model.eval()(x).codes.shape[-1] == 3


def test_one_stage(device):
    x = torch.randn(4, 50, 12, device=device)
    torch.manual_seed(1)
    single = nn.VectorQuantizer(12, 16).to(device)
    out = single(x)
    assert out.codes.shape == (4, 50) and out.usage.counts.shape == (16,)
    torch.manual_seed(1)
    stages = make(device, num_quantizers=1)
    expected = stages(x)
    assert torch.equal(out.codes, expected.codes[..., 0])
    assert torch.equal(out.quantized, expected.quantized) and out.loss == expected.loss
    assert torch.equal(single.encode(x), stages.encode(x)[..., 0])
    assert torch.equal(single.decode(out.codes), stages.decode(expected.codes))


@pytest.mark.parametrize("kind", ["ema", "gradient", "projection", "dac"])
def test_autocast_changes_nothing(device, kind):
    model = trained(device, **KINDS[kind])
    other = copy.deepcopy(model)
    x = torch.randn(60, 12, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = model(x)
    expected = other(x)
    assert torch.equal(out.codes, expected.codes) and torch.equal(out.quantized, expected.quantized)
    assert out.loss.dtype == torch.float32 and torch.equal(out.loss, expected.loss)
    assert not changed(model, other.state_dict())


@pytest.mark.parametrize("kind", ["ema", "projection"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_vectors(device, kind, dtype):
    model = trained(device, **KINDS[kind])
    x = torch.randn(60, 12, device=device).to(dtype).requires_grad_()
    codes = model.encode(x.float())
    out = model(x)
    assert out.quantized.dtype == dtype and torch.equal(out.codes, codes)
    out.loss.backward()
    assert x.grad.dtype == dtype and model.codebooks.dtype == torch.float32
    model.to(dtype).eval()  # for inference the whole model may be narrow
    assert model(x).quantized.dtype == dtype
    with pytest.raises(ValueError, match="codebooks must be float32 or float64 in training"):
        model.train()(x)


def test_float64():
    model = make("cpu").double()
    x = torch.randn(300, 12, dtype=torch.float64)
    out = model(x)
    assert out.quantized.dtype == out.loss.dtype == model.codebooks.dtype == torch.float64


@kinds
def test_checkpoint(device, kind):
    model = trained(device, **KINDS[kind])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = make(device, **KINDS[kind])
    loaded.load_state_dict(torch.load(file))
    x = torch.randn(30, 12, device=device)
    torch.manual_seed(2)
    expected = model(x)
    torch.manual_seed(2)
    out = loaded(x)  # goes on where it was, without k-means
    assert torch.equal(out.codes, expected.codes)
    assert not changed(loaded, model.state_dict())
    untrained = make(device, **KINDS[kind])
    loaded.load_state_dict(untrained.state_dict())
    before = clone_state(loaded)
    loaded(torch.randn(300, 12, device=device))
    assert "initialized" in changed(loaded, before)


def test_usage():
    codes = torch.tensor([[0, 3], [1, 3], [0, -1], [1, 3]])
    usage = nn.code_usage(codes, 4)
    assert usage.counts.tolist() == [[2, 2, 0, 0], [0, 0, 0, 3]]
    assert usage.share().tolist() == [[0.5, 0.5, 0, 0], [0, 0, 0, 1]]
    torch.testing.assert_close(usage.entropy_bits(), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(usage.perplexity(), torch.tensor([2.0, 1.0]))
    assert usage.used_share().tolist() == [0.5, 0.25]
    twice = nn.CodeUsage(usage.counts + nn.code_usage(codes, 4).counts)
    assert torch.equal(twice.perplexity(), usage.perplexity())
    assert nn.code_usage(torch.zeros(0, 2), 4).perplexity().tolist() == [1, 1]


def refused(match, **options):
    with pytest.raises(ValueError, match=match):
        make("cpu", **options)


def test_wrong_options_are_refused():
    refused("dim must be 1 or more, got 0", dim=0)
    refused("num_quantizers must be 1 or more, got 0", num_quantizers=0)
    refused("codebook_size must be 1 or more, got -1", codebook_size=-1)
    refused("codebook_dim must be 1 or more, got 0", codebook_dim=0)
    refused("metric must be one of l2, cosine, got 'dot'", metric="dot")
    refused("learning must be one of ema, gradient, got 'adam'", learning="adam")
    refused("projection must be one of shared, per_stage, got 'none'", projection="none")
    refused("decay must be from 0 to 1, got 1.5", decay=1.5)
    refused("epsilon must be above 0, got 0", epsilon=0)
    refused("commitment_weight must be 0 or more, got -1", commitment_weight=-1)
    refused("dead_code_threshold must be 0 or more, got nan", dead_code_threshold=float("nan"))
    refused("kmeans_iters must be 0 or more, got -1", kmeans_iters=-1)
    refused("quantizer_dropout must be from 0 to 1, got 2", quantizer_dropout=2)
    refused("beam must be from 1 to 32, got 0", beam=0)
    refused("beam must be 1 with metric='cosine', got 2", beam=2, metric="cosine")
    refused("beam must be left out with projection='per_stage'", beam=2, projection="per_stage")
    refused("shared_codebook must be left out", shared_codebook=True, projection="per_stage")


def test_wrong_inputs_are_refused():
    model = make("cpu")
    x = torch.randn(2, 5, 12)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 12\], got \[2, 5, 11\]"):
        model(x[..., :11])
    with pytest.raises(ValueError, match=r"x must have shape \[..., 12\], got \[\]"):
        model(torch.tensor(1.0))
    with pytest.raises(
        ValueError, match=r"mask must be bool of shape \[2, 5\].*got torch.bool.*5, 2"
    ):
        model(x, torch.ones(5, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask must be bool .* got torch.int64"):
        model(x, torch.ones(2, 5, dtype=torch.int64))
    for n_stages in (0, 4):
        with pytest.raises(ValueError, match=f"n_stages must be from 1 to .* 3, got {n_stages}"):
            model(x, n_stages=n_stages)
    with pytest.raises(ValueError, match=r"codes must have shape .* got \[2, 4\]"):
        model.decode(torch.zeros(2, 4, dtype=torch.int32))
    assert not model.initialized  # refused before anything was done
