import lzma
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sparsemoe.data import Corpus
from sparsemoe.evaluate import bits_per_byte, xz_bits_per_byte
from sparsemoe.evaluate.bits import _windows
from sparsemoe.models.moe_lm import MoELM
from tests.tiny_lm import tiny_model


def make_corpus(length: int, seed: int = 0) -> Corpus:
    data = np.random.default_rng(seed).integers(0, 256, length).astype(np.uint8)
    return Corpus(data, np.array([0, length // 2]), ["a", "b"])


class Copier(nn.Module):
    """Predicts that the next byte is the last one, with probability 1/2."""

    def __init__(self, context: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(context=context)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens):
        logits = torch.zeros(*tokens.shape, 256)
        logits.scatter_(2, tokens.clamp(max=255)[..., None], np.log(255.0))
        return logits, {}


@pytest.mark.parametrize("length", [1, 9, 10, 11, 57, 100])
@pytest.mark.parametrize("overlap", [0, 3, 9])
def test_windows_count_each_byte_once(length, overlap):
    context = min(10, length)
    overlap = min(overlap, context - 1)
    begins, news = _windows(length, context, overlap)
    times = np.zeros(length, dtype=int)
    for begin, new in zip(begins, news, strict=True):
        assert begin >= 0 and begin + context <= length
        times[begin + context - new : begin + context] += 1
        assert begin == 0 or context - new >= overlap
    assert (times == 1).all()


@pytest.mark.parametrize("overlap", [0, 5, None])
def test_bits_of_a_known_predictor(overlap):
    corpus = Corpus(np.frombuffer(b"aaab" * 50, dtype=np.uint8), np.zeros(1, dtype=int), ["x"])
    result = bits_per_byte(Copier(16), corpus, overlap=overlap)
    same = 2 * 50  # "aa" comes twice in four bytes and costs 1 bit; all else, the first byte too,
    expected = (same * 1 + (200 - same) * np.log2(510)) / 200  # has one chance in 510
    assert result.bytes == 200
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_more_overlap_changes_context_not_bytes():
    torch.manual_seed(0)
    model = MoELM(tiny_model())
    corpus = make_corpus(300)
    model.train()
    none, half = (bits_per_byte(model, corpus, overlap=o) for o in (0, 16))
    assert model.training
    assert none.bytes == half.bytes == 300
    assert none.bits_per_byte != half.bits_per_byte
    assert half.bits_per_byte == pytest.approx(8, abs=0.3)
    assert bits_per_byte(model, corpus, batch_size=3, overlap=16).bits_per_byte == pytest.approx(
        half.bits_per_byte, rel=1e-6
    )


def test_a_part_and_a_short_corpus():
    torch.manual_seed(0)
    model = MoELM(tiny_model())
    assert bits_per_byte(model, make_corpus(1024), overlap=0, max_bytes=100).bytes == 96
    short = bits_per_byte(model, make_corpus(5))
    assert (short.bytes, short.context) == (5, 5)


def test_xz_is_the_compressor():
    corpus = make_corpus(1000)
    packed = lzma.compress(corpus.data.tobytes(), preset=9)
    assert xz_bits_per_byte(corpus) == 8 * len(packed) / 1000
    assert packed[:6] == b"\xfd7zXZ\x00"
