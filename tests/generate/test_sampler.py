import pytest
import torch

from sparsemoe.generate import Sampling, generate
from sparsemoe.models.moe_lm import START, MoELM
from tests.tiny_lm import tiny_model


@pytest.fixture(scope="module")
def model() -> MoELM:
    torch.manual_seed(0)
    model = MoELM(tiny_model())
    with torch.no_grad():
        model.embedding.weight *= 20  # a distribution with peaks
    return model.eval()


def draw(sampling: Sampling, logits: torch.Tensor, count: int = 2000) -> list[int]:
    generator = torch.Generator().manual_seed(sampling.seed)
    return [int(sampling.draw(logits, generator)) for _ in range(count)]


def test_the_seed_decides_the_text(model):
    def text(seed: int) -> bytes:
        return bytes(generate(model, b"def ", 60, Sampling(temperature=1.0, seed=seed)))

    assert text(3) == text(3)
    assert text(3) != text(4)
    torch.manual_seed(99)  # the global generator has no part in it
    first = text(3)
    torch.manual_seed(98)
    assert text(3) == first


def test_greedy_takes_the_likeliest_of_the_uncached_model(model):
    text = bytes(generate(model, b"def ", 20, Sampling(temperature=0)))
    seen = [START, *b"def "]
    for byte in text:
        assert byte == int(model(torch.tensor([seen]))[0][0, -1].argmax())
        seen.append(byte)


def test_goes_on_past_the_context(model):
    assert len(list(generate(model, b"x" * 100, 100))) == 100
    assert len(list(generate(model, b"", 40))) == 40
    assert list(generate(model, b"abc", 0)) == []


def test_top_k_and_top_p_cut_the_tail():
    logits = torch.zeros(256)
    logits[10], logits[20], logits[30] = 8.0, 7.0, 6.0
    assert set(draw(Sampling(temperature=1.0, top_p=1.0, top_k=2), logits)) == {10, 20}
    assert set(draw(Sampling(temperature=1.0, top_p=0.7), logits)) == {10, 20}
    assert set(draw(Sampling(temperature=1.0, top_p=1e-6), logits)) == {10}
    assert len(set(draw(Sampling(temperature=1.0, top_p=1.0), logits))) > 3


def test_temperature_follows_the_softmax():
    logits = torch.full((256,), -1e9)
    logits[1], logits[2] = 0.0, torch.log(torch.tensor(3.0))
    share = draw(Sampling(temperature=1.0, top_p=1.0), logits).count(2) / 2000
    assert share == pytest.approx(0.75, abs=0.04)
    share = draw(Sampling(temperature=0.5, top_p=1.0), logits).count(2) / 2000
    assert share == pytest.approx(0.9, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; it must be 0 or more"),
        ({"top_k": 0}, "top_k is 0; it must be at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0; it must be above 0"),
        ({"top_p": 1.1}, "top_p is 1.1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**options)
