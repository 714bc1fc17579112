"""Bytes to train on: corpora of files, their held-out part, and a sampler that resumes."""

from sparsemoe.data.corpus import (
    Corpus,
    DataError,
    find_files,
    load_corpora,
    load_corpus,
    load_standard_library,
    split_files,
)
from sparsemoe.data.sampler import BatchSampler

__all__ = [
    "BatchSampler",
    "Corpus",
    "DataError",
    "find_files",
    "load_corpora",
    "load_corpus",
    "load_standard_library",
    "split_files",
]
