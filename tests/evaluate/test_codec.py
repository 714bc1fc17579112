from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sparsemoe.data import Corpus
from sparsemoe.evaluate import evaluate_codec, zstd_bits_per_byte
from sparsemoe.evaluate.codec_report import compressors, format_evaluation, plot_codec

TEXT = b"aabbaabc" + b"aabbabbb" + b"ab"


class TwoStages(nn.Module):
    """Two bytes a patch. Stage 1 keeps a patch's first byte, stage 2 its second, both as byte mod
    4. A byte that is coded gets probability 1/2, one that is not 'a'."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(
            compression_ratio=2, context=8, num_quantization_stages=2, codebook_size=4
        )

    def encode(self, tokens, tries=0):
        self.tries = tries
        return (tokens % 4).unflatten(1, (-1, 2)).int()

    def decode(self, codes):
        known = torch.full((*codes.shape[:2], 2), ord("a"))
        known[..., : codes.shape[-1]] = codes + 96
        logits = torch.zeros(codes.shape[0], 2 * codes.shape[1], 256)
        return logits.scatter_(2, known.flatten(1)[..., None], np.log(255.0))


def make_corpus(text: bytes) -> Corpus:
    return Corpus(np.frombuffer(text, dtype=np.uint8), np.zeros(1, dtype=int), ["x"])


def test_figures_of_a_known_codec():
    """18 bytes: windows aabbaabc, aabbabbb, ab; patches aa bb aa bc | aa bb ab bb | ab."""
    result = evaluate_codec(TwoStages(), make_corpus(TEXT), batch_size=2)
    assert (result.bytes, result.patches, result.windows) == (18, 9, 3)
    assert (result.context, result.compression_ratio) == (8, 2)
    first, both = result.stages
    # first bytes: a b a b a b a b a; second: a b a c a b b b b
    shares = [np.array([5, 4]) / 9, np.array([3, 5, 1]) / 9]
    entropy = [-(p * np.log2(p)).sum() for p in shares]
    assert result.entropy == pytest.approx(entropy)
    assert result.perplexity == pytest.approx([2**h for h in entropy])
    assert result.usage == pytest.approx([2 / 4, 3 / 4])
    assert (first.stages, both.stages) == (1, 2)
    assert first.byte_accuracy == pytest.approx((9 + 3) / 18)
    assert first.exact_patches == pytest.approx(3 / 9)  # only "aa"
    assert first.exact_windows == 0
    right, wrong = np.log2(2), np.log2(510)
    assert first.reconstruction_bits == pytest.approx((12 * right + 6 * wrong) / 18, rel=1e-5)
    assert first.code_bits == pytest.approx(entropy[0] * 9 / 18)
    assert both.byte_accuracy == both.exact_patches == both.exact_windows == 1
    assert both.reconstruction_bits == pytest.approx(1, rel=1e-5)
    assert both.code_bits == pytest.approx(sum(entropy) / 2)
    assert both.total_bits == both.code_bits + both.reconstruction_bits


def test_tries_are_those_of_encode():
    codec = TwoStages()
    assert evaluate_codec(codec, make_corpus(TEXT), tries=3).tries == codec.tries == 3


def test_a_byte_past_the_end_is_not_counted():
    result = evaluate_codec(TwoStages(), make_corpus(b"aab"))
    assert (result.bytes, result.patches, result.windows) == (3, 2, 1)
    assert result.usage == pytest.approx([2 / 4, 2 / 4])  # a b; a, and what is padded
    assert result.stages[1].code_bits == pytest.approx((1 + 1) * 2 / 3)
    assert result.stages[1].exact_patches == 1


def test_the_batch_size_changes_nothing_and_a_part_may_do():
    model = TwoStages()
    corpus = make_corpus(TEXT * 40)
    model.train()
    one, many = (evaluate_codec(model, corpus, batch_size=size) for size in (1, 7))
    assert model.training and one.stages[0].byte_accuracy == many.stages[0].byte_accuracy
    assert one.entropy == many.entropy
    part = evaluate_codec(model, corpus, max_bytes=30, stages=[2])
    assert (part.bytes, part.windows, len(part.stages)) == (24, 3, 1)


def test_report_and_plot(tmp_path):
    corpus = make_corpus(TEXT * 40)
    result = evaluate_codec(TwoStages(), corpus)
    others = {**compressors(corpus), "zstd_bits_per_byte": None}
    text = format_evaluation(result, others)
    for part in ("bytes right", "100.000%", "2 stages", "zstd -19", "not installed"):
        assert part in text, part
    records = [
        {"step": s, "seconds": 9.0 * s, "byte_accuracy": 0.1 * s, "perplexity": [2.0, 3.0]}
        for s in range(1, 6)
    ] + [{"step": 5, "seconds": 45.0, "validation_byte_accuracy": 0.4}]
    path = plot_codec(tmp_path / "new/plot.png", result, records, others)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert plot_codec(tmp_path / "none.png", result, [], others).exists()


def test_zstd(monkeypatch):
    corpus = make_corpus(TEXT * 40)
    bits = zstd_bits_per_byte(corpus)
    assert bits is None or 0 < bits < 8
    monkeypatch.setenv("PATH", "")
    assert zstd_bits_per_byte(corpus) is None
