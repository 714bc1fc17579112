import numpy as np
import pytest
import torch

from sparsemoe.data import BatchSampler, Corpus, DataError


@pytest.fixture
def corpus() -> Corpus:
    data = (np.arange(1003) % 251).astype(np.uint8)
    return Corpus(data, np.zeros(1, dtype=np.int64), ["numbers"])


def test_an_epoch_visits_each_window_once(corpus):
    sampler = BatchSampler(corpus, length=10, batch_size=7, seed=3)
    positions = []
    while sampler.epoch == 0:
        positions += sampler.next_positions().tolist()
    count = (1003 - positions[0] % 10) // 10
    first = sorted(positions[:count])
    assert first == list(range(first[0], first[0] + 10 * count, 10))
    assert positions[:count] != first
    assert first[0] < 10 and first[-1] + 10 <= 1003


def test_order_depends_on_the_seed_alone(corpus):
    def draw(seed: int) -> list[int]:
        sampler = BatchSampler(corpus, 10, 7, seed)
        return [p for _ in range(40) for p in sampler.next_positions().tolist()]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("steps", [0, 1, 13, 14, 15, 50])
def test_resumes_where_it_stopped(corpus, steps):
    sampler = BatchSampler(corpus, 10, 7, seed=5)
    for _ in range(steps):
        sampler.next_batch()
    resumed = BatchSampler(corpus, 10, 7, seed=5)
    resumed.load_state_dict(sampler.state_dict())
    for _ in range(30):
        for a, b in zip(sampler.next_batch(), resumed.next_batch(), strict=True):
            assert torch.equal(a, b)


def test_a_batch_may_be_larger_than_an_epoch():
    data = np.arange(25, dtype=np.uint8)
    corpus = Corpus(data, np.zeros(1, dtype=np.int64), ["few"])
    inputs, targets = BatchSampler(corpus, 10, 16).next_batch()
    assert inputs.shape == targets.shape == (16, 10)
    assert (targets[:, :-1] == inputs[:, 1:]).all()


def test_too_little_data_is_refused(corpus):
    with pytest.raises(DataError, match="1003 bytes, less than one context of 1004"):
        BatchSampler(corpus, 1004, 1)
    BatchSampler(corpus, 1003, 1).next_batch()


def test_bytes_are_the_targets(corpus):
    one, other = (BatchSampler(corpus, 10, 7, seed=5) for _ in range(2))
    for _ in range(20):
        bytes_, (_, targets) = one.next_bytes(), other.next_batch()
        assert bytes_.dtype == torch.int64 and torch.equal(bytes_, targets)
