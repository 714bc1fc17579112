import pytest
import torch

from sparsemoe import nn
from tests.nn.peer_quantizers import OUR_OPTIONS, PEER_OPTIONS, stored_peer, trained_peer


def state_of(peer):
    return {k.removeprefix("state/"): v for k, v in peer.items() if k.startswith("state/")}


def ours(name, peer, **options):
    options = {**OUR_OPTIONS[name], "dead_code_threshold": 0, **options}
    return nn.ResidualVQ.from_vector_quantize_pytorch(state_of(peer), **options)


def check(name, peer):
    model = ours(name, peer)
    assert torch.equal(model.encode(peer["x"]), peer["codes"])
    torch.testing.assert_close(model.decode(peer["codes"]), peer["quantized"])
    # Training goes on as it would there: one step of the moving averages.
    if name in ("l2", "cosine", "projection"):
        model = ours(name, peer, decay=0.8)
        out = model(peer["x"])
        torch.testing.assert_close(model.codebooks, peer["codebooks_after"], rtol=1e-5, atol=1e-6)
        assert not torch.equal(model.codebooks, ours(name, peer).codebooks)
        assert torch.equal(out.codes, peer["codes"])


@pytest.mark.parametrize("name", PEER_OPTIONS)
def test_codes_of_stored_models(name):
    check(name, stored_peer(name))


@pytest.mark.parametrize("name", PEER_OPTIONS)
def test_codes_of_the_installed_package(name):
    pytest.importorskip("vector_quantize_pytorch")
    check(name, trained_peer(name))


def test_what_is_not_supported_is_refused():
    peer = stored_peer("l2")
    state = state_of(peer)
    read = nn.ResidualVQ.from_vector_quantize_pytorch
    with pytest.raises(ValueError, match=r"got the entry 'mlps.0.proj_in.weight'"):
        read({**state, "mlps.0.proj_in.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"got the entry 'layers.0._codebook.batch_mean'"):
        read({**state, "layers.0._codebook.batch_mean": torch.zeros(1)})
    with pytest.raises(ValueError, match="all of one shape"):
        read({**state, "layers.1._codebook.embed": torch.zeros(1, 4, 6)})
    with pytest.raises(ValueError, match="all of one shape"):
        read({key: value for key, value in state.items() if not key.startswith("layers.1.")})
    with pytest.raises(ValueError, match="all of one shape"):
        read({})
    with pytest.raises(ValueError, match="one codebook for all stages"):
        read(state, shared_codebook=True)
