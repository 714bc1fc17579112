"""k-means, moving averages, dead codes, and the training step as a compiled and a captured one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from sparsemoe.nn.codebook_updates import replacements, sample_rows
from sparsemoe.nn.kmeans import kmeans
from sparsemoe.reference import rvq as reference
from tests.nn.quantizer_cases import KINDS, changed, clone_state, kinds, make, trained


def clusters(device, num=20, per_cluster=40, width=12, spread=0.05, length=None):
    centres = torch.randn(num, width, device=device)
    if length is not None:
        centres = length * F.normalize(centres, dim=-1)
    x = centres[:, None] + spread * torch.randn(num, per_cluster, width, device=device)
    return x.flatten(0, 1)[torch.randperm(num * per_cluster, device=device)]


def error(model, x):
    return (model.decode(model.encode(x)) - x).square().mean().item()


@kinds
def test_training_lowers_the_error(device, kind):
    x = clusters(device, length=1.0 if "cosine" in kind else None)
    model = make(device, kmeans_init=False, decay=0.9, dead_code_threshold=2, **KINDS[kind])
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 1e-2) if parameters else None
    before = error(model, x)
    for _ in range(100):
        out = model(x)
        if optimizer is not None:
            optimizer.zero_grad()
            (out.loss + (out.quantized - x).square().mean()).backward()
            optimizer.step()
    after = error(model, x)
    assert after < 0.7 * before
    if kind == "gradient":
        assert after < 0.04 * x.var()
    elif kind in ("ema", "beam"):
        assert after < 0.005 * x.var()
        # at most 0.5 of some stage where no code is replaced
        assert out.usage.used_share().min() > 0.6


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_kmeans_finds_clusters(device, metric):
    unit = metric == "cosine"
    for seed in range(5):  # not by luck
        torch.manual_seed(seed)
        x = clusters(device, num=20, length=3.0)
        x = F.normalize(x, dim=-1) if unit else x
        torch.manual_seed(seed)
        centres, counts = kmeans(x, 24, 20, metric=metric, unit=unit)
        distance = (x - centres[reference.nearest(x, centres, metric)]).square().sum(-1)
        within = 12 * 0.05**2 / (9 if unit else 1)
        assert distance.mean() < 1.5 * within  # a cluster without a centre would cost far more
        assert counts.sum() == len(x) and (counts > 0).all()
        if unit:
            torch.testing.assert_close(centres.norm(dim=-1), torch.ones(24, device=device))
        torch.manual_seed(seed)
        assert torch.equal(centres, kmeans(x, 24, 20, metric=metric, unit=unit)[0])


@pytest.mark.parametrize("size", [60, 1000])  # all vectors are candidates, or some
def test_kmeans_starts_in_every_cluster(device, size):
    """As many centres as clusters, one of a vector: a start that misses one never finds it."""
    corners = 10 * torch.eye(12, device=device)
    for seed in range(20):
        torch.manual_seed(seed)
        x = corners.repeat_interleave(size // 12, 0)
        x = torch.cat([x + 0.1 * torch.randn_like(x), -100 * corners[:1]])
        centres = kmeans(x, 13, 0)[0]
        assert len(torch.cdist(centres, torch.cat([corners, x[-1:]])).argmin(-1).unique()) == 13


def test_kmeans_starts_from_finite_vectors(device):
    x = torch.randn(600, 12, device=device)
    for value in (torch.nan, torch.inf):
        for size in (40, 600):
            broken = x[:size].clone()
            broken[::2, 3] = value
            for metric in ("l2", "cosine"):
                assert kmeans(broken, 16, 0, metric=metric)[0].isfinite().all()
        broken = torch.full_like(x, value)
        assert kmeans(broken, 16, 1)[1].sum() == 600  # nor does it fail


def test_kmeans_starts_empty_clusters_anew(device):
    x = torch.cat([torch.zeros(50, 2), torch.tensor([[5.0, 0], [0, 5], [5, 5]])]).to(device)
    for start in (None, torch.zeros(4, 2, device=device)):  # all the same: three are empty
        centres, counts = kmeans(x, 4, 10, start=start)
        assert sorted(counts.tolist()) == [1, 1, 1, 50]
        assert torch.equal(x, centres[reference.nearest(x, centres)])


def test_kmeans_with_fewer_vectors_than_clusters(device):
    x = torch.randn(5, 12, device=device)
    centres, counts = kmeans(x, 16, 3)
    assert centres.isfinite().all() and counts.sum() == 5
    same = kmeans(x[:1].expand(40, -1).contiguous(), 16, 3)[0]
    torch.testing.assert_close(same, x[:1].expand(16, -1))  # means of equal vectors round


@kinds
def test_first_batch_sets_the_codebooks(device, kind):
    x = clusters(device, num=16, length=1.0)
    torch.manual_seed(4)
    model = make(device, **KINDS[kind])
    assert not model.initialized
    worse = error(model, x)
    model.eval()(x)
    assert not model.initialized  # only training does
    model.train()(x)
    assert model.initialized
    sizes = 3 * len(x) if model.shared_codebook else len(x)
    assert (model.cluster_size.sum(-1) / sizes - 1).abs().max() < 0.1
    if kind in ("ema", "gradient", "beam"):
        assert error(model, x) < 0.03 * x.var()
    elif model.project_in is None:
        assert error(model, x) < 0.8 * worse
    torch.manual_seed(4)
    again = make(device, **KINDS[kind])
    again(x)
    assert not changed(again, model.state_dict())


def test_first_codes_are_of_a_sample(device, monkeypatch):
    seen = []

    def spy(x, *args, **options):
        seen.append(len(x))
        return kmeans(x, *args, **options)

    monkeypatch.setattr("sparsemoe.nn.codebooks.kmeans", spy)
    model = make(device, codebook_size=2, dead_code_threshold=0)
    model(torch.randn(1000, 12, device=device))
    assert seen == [128, 128, 128]
    torch.testing.assert_close(model.cluster_size.sum(-1), torch.full((3,), 1000.0, device=device))


@pytest.mark.parametrize("kind", ["ema", "beam", "per_stage"])
def test_moving_averages(device, kind):
    model = trained(device, dead_code_threshold=0, **KINDS[kind])
    x = torch.randn(50, 12, device=device)
    expected = copy.deepcopy(model)
    codes = model(x).codes
    if kind == "per_stage":
        residual = x
        for q in range(3):
            z = model.project_in(residual, q)
            stage = [t[q : q + 1] for t in (expected.codebooks, expected.cluster_size)]
            before = stage[0].clone()
            reference.ema_update(*stage, expected.embed_sum[q : q + 1], z, codes[:, q : q + 1])
            residual = residual - model.project_out(before[0][codes[:, q].long()], q)
    else:
        reference.ema_update(
            expected.codebooks, expected.cluster_size, expected.embed_sum, x, codes
        )
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected.state_dict()[name], msg=name)


def test_moving_averages_of_a_shared_codebook(device):
    model = trained(device, shared_codebook=True, dead_code_threshold=0)
    expected = copy.deepcopy(model)
    x = torch.randn(50, 12, device=device)
    codes = model(x).codes
    stages = expected.codebooks.expand(3, -1, -1)
    residuals = [x - reference.decode(codes[:, :q], stages) for q in range(3)]
    reference.ema_update(
        expected.codebooks,
        expected.cluster_size,
        expected.embed_sum,
        torch.cat(residuals),
        codes.T.reshape(-1, 1),
    )
    torch.testing.assert_close(model.codebooks, expected.codebooks)
    torch.testing.assert_close(model.cluster_size, expected.cluster_size)


def test_moving_averages_with_cosine(device):
    model = trained(device, metric="cosine", dead_code_threshold=0, decay=0.9)
    before = clone_state(model)
    x = torch.randn(50, 12, device=device)
    codes = model(x).codes.long()
    residual = x
    for q in range(3):
        sums = torch.zeros_like(before["embed_sum"][q])
        sums.index_add_(0, codes[:, q], F.normalize(residual, dim=-1))
        sums = 0.9 * before["embed_sum"][q] + 0.1 * sums
        torch.testing.assert_close(model.embed_sum[q], sums)
        torch.testing.assert_close(model.codebooks[q], F.normalize(sums, dim=-1))
        residual = residual - before["codebooks"][q][codes[:, q]]


def dying(device, kind, stage):
    """A model one of whose codes, number 3 of `stage`, lies where nothing will choose it."""
    model = trained(device, dead_code_threshold=1.0, **KINDS[kind])
    with torch.no_grad():
        model.codebooks[stage, 3] = 1000.0
        if model.embed_sum is not None:
            model.embed_sum[stage, 3] = 5.0
            model.cluster_size[stage, 3] = 0.005
        else:
            model.cluster_size[stage, 3] = 0.0
    return model


@pytest.mark.parametrize("kind", ["ema", "gradient", "beam", "shared_codebook"])
@pytest.mark.parametrize("stage", [0, 2])
def test_a_dead_code_becomes_a_residual_of_its_stage_and_stays(device, kind, stage):
    shared = kind == "shared_codebook"
    model = dying(device, kind, 0 if shared else stage)
    before = model._stages(0, 3).detach().clone()
    x = torch.randn(60, 12, device=device)
    codes = model(x).codes
    place = (0 if shared else stage, 3)
    revived = model.codebooks[place].detach().clone()
    seen = [x - reference.decode(codes[:, :q], before) for q in range(3)]
    seen = torch.cat(seen) if shared else seen[stage]
    assert (seen - revived).abs().amax(-1).min() < 1e-5
    assert model.cluster_size[place] >= 1
    # Only the next step shows whether its averages were reset too.
    model(x)
    after = model.codebooks[place]
    assert (after - revived).norm() < 0.3 * revived.norm()
    assert (model.encode(x)[:, slice(None) if shared else stage] == 3).any() or stage > 0


def test_revived_unit_codes_have_length_1(device):
    model = dying(device, "cosine", 1)
    with torch.no_grad():
        model.codebooks[1, 3] = F.normalize(model.codebooks[1, 3], dim=-1)
        model.cluster_size[1] = 0
    before = clone_state(model)
    model(torch.randn(60, 12, device=device))
    assert not torch.allclose(model.codebooks[1], before["codebooks"][1])
    torch.testing.assert_close(model.codebooks.norm(dim=-1), torch.ones(3, 16, device=device))


def test_no_code_dies_without_a_threshold(device):
    model = dying(device, "gradient", 0)
    model.dead_code_threshold = 0.0
    before = clone_state(model)
    model(torch.randn(60, 12, device=device))
    assert not changed(model, before)


def test_padding_replaces_no_code(device):
    model = trained(device, dead_code_threshold=1e6)  # all die
    x = torch.randn(200, 12, device=device)
    mask = torch.rand(200, device=device) > 0.7
    x[~mask] = 1000.0
    model(x, mask)
    first = model.codebooks[0]
    distance = torch.cdist(first, x[mask], compute_mode="donot_use_mm_for_euclid_dist")
    assert (distance.amin(-1) < 1e-5).all()
    assert len(first.unique(dim=0)) == 16  # different vectors
    nothing = trained(device, dead_code_threshold=1e6)
    before = nothing.codebooks.clone()
    nothing(x, torch.zeros_like(mask))
    torch.testing.assert_close(nothing.codebooks, before, rtol=1e-3, atol=1e-3)


def test_replacements_are_residuals_by_stage(device):
    model = trained(device)
    x = torch.randn(100, 12, device=device)
    codes = model.encode(x)
    vectors, there = replacements(x, codes, model.codebooks, None)
    assert there.all() and vectors.shape == (3, 16, 12)
    for q in range(3):
        seen = x - reference.decode(codes[:, :q], model.codebooks)
        near = (vectors[q][:, None] - seen).abs().amax(-1)
        assert (near.amin(-1) < 1e-5).all()
        assert len(near.argmin(-1).unique()) == 16


def test_sampled_rows_are_valid_and_different(device):
    device = torch.device(device)
    for seed in range(20):
        torch.manual_seed(seed)
        valid = torch.rand(100, device=device) < 0.3
        rows, total = sample_rows(100, valid, 20, device)
        assert valid[rows].all() and total == valid.sum()
        assert len(rows.unique()) == min(20, int(total))
    drawn = torch.cat([sample_rows(10, None, 3, device)[0] for _ in range(600)])
    assert (drawn.bincount(minlength=10) > 110).all()  # 180 each; any row can be drawn
    rows, _ = sample_rows(3, None, 7, device)
    assert set(rows.tolist()) == {0, 1, 2}
    rows, total = sample_rows(4, torch.zeros(4, dtype=torch.bool, device=device), 7, device)
    assert total == 0 and ((rows >= 0) & (rows < 4)).all()


def compare_compiled(model, n_stages=3, **options):
    """One graph: so nothing in it waits for the device either."""
    torch._dynamo.reset()
    device = model.codebooks.device
    other = copy.deepcopy(model)
    compiled = torch.compile(other, fullgraph=True, **options)
    mask = torch.rand(80, device=device) > 0.2
    x = torch.randn(80, 12, device=device, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    expected = model(x, mask, n_stages)
    (expected.loss + expected.quantized.square().mean()).backward()
    torch.manual_seed(5)
    out = compiled(y, mask, n_stages)
    (out.loss + out.quantized.square().mean()).backward()
    assert torch.equal(out.codes, expected.codes)
    torch.testing.assert_close(y.grad, x.grad)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("kind, n_stages", [("ema", 2), ("dac", 3), ("shared_codebook_cosine", 3)])
def test_compiled_step(device, kind, n_stages):
    model = trained(device, dead_code_threshold=3, **KINDS[kind])
    compare_compiled(model, n_stages, backend="aot_eager")


def test_step_compiled_by_the_default_backend(device):
    """Where the codebooks move fast, and so a backward pass that reads them too late is wrong."""
    compare_compiled(trained(device, dead_code_threshold=0, decay=0.1))


def test_what_cannot_be_compiled_is_refused(device):
    x = torch.randn(80, 12, device=device)
    for model, match in [
        (make(device), "the first training step must run before the quantizer is compiled"),
        (trained(device, quantizer_dropout=1.0), "n_stages must be given"),
    ]:
        torch._dynamo.reset()
        with pytest.raises(Exception, match=match):
            torch.compile(model, backend="aot_eager", fullgraph=True)(x)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def step(model, x, mask):
    x.grad = None
    out = model(x, mask)
    (out.loss + (out.quantized - x.detach()).square().mean()).backward()
    return out


@needs_gpu
@kinds
def test_a_training_step_does_not_wait(kind):
    model = trained("cuda", dead_code_threshold=3, **KINDS[kind])
    x = torch.randn(200, 12, device="cuda", requires_grad=True)
    mask = torch.rand(200, device="cuda") > 0.2
    step(model, x, mask)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        out = step(model, x, mask)
        out.usage.perplexity()
        step(model, x, None)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
@kinds
def test_captured_step(kind):
    """Replays train as eager steps do. No code dies: what replaces it would be another draw."""
    model = trained("cuda", dead_code_threshold=0, **KINDS[kind])
    eager = copy.deepcopy(model)
    x = torch.randn(200, 12, device="cuda", requires_grad=True)
    mask = torch.rand(200, device="cuda") > 0.2
    state = clone_state(model)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step(model, x, mask)
    torch.cuda.current_stream().wait_stream(stream)
    for parameter in model.parameters():
        parameter.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(model, x, mask)
    model.load_state_dict(state)
    for _ in range(3):
        batch = torch.randn(200, 12, device="cuda")
        with torch.no_grad():
            x.copy_(batch)
        graph.replay()
        expected = step(eager, batch.requires_grad_(), mask)
        assert torch.equal(out.codes, expected.codes)
        torch.testing.assert_close(out.loss, expected.loss)
        for name, value in eager.state_dict().items():
            torch.testing.assert_close(model.state_dict()[name], value, msg=name)


@needs_gpu
def test_captured_step_revives():
    model = trained("cuda", dead_code_threshold=3)
    x = torch.randn(200, 12, device="cuda", requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step(model, x, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(model, x, None)
    drawn = []
    for _ in range(2):
        with torch.no_grad():
            model.codebooks[0, 3] = 1000.0
            model.embed_sum[0, 3] = 5.0
            model.cluster_size[0, 3] = 0.005
        graph.replay()
        assert (x - model.codebooks[0, 3]).abs().amax(-1).min() < 1e-5
        drawn.append(model.codebooks[0, 3].clone())
    assert not torch.equal(*drawn)  # each replay draws anew
