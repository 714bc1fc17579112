"""Batches of windows in an order that depends on the seed alone."""

from __future__ import annotations

import numpy as np
import torch

from sparsemoe.data.corpus import Corpus, DataError


class BatchSampler:
    """Draws batches without end: each epoch cuts the corpus into windows from a random
    offset and visits them once, in random order.

    The whole state is how many windows have been drawn, so a run continues where it stopped.
    Raises DataError where the corpus is shorter than one window.
    """

    def __init__(self, corpus: Corpus, length: int, batch_size: int, seed: int = 0) -> None:
        if len(corpus) < length:
            raise DataError(
                f"the training data holds {len(corpus)} bytes, less than one context of {length}"
            )
        self.corpus, self.length, self.batch_size, self.seed = corpus, length, batch_size, seed
        self.epoch = 0
        self.drawn = 0  # windows of this epoch
        self._order: np.ndarray | None = None

    def _epoch_order(self) -> np.ndarray:
        """Positions of this epoch's windows, in the order of their visit."""
        random = np.random.default_rng([self.seed, self.epoch])
        spare = len(self.corpus) - self.length
        offset = int(random.integers(min(self.length, spare + 1)))
        count = (len(self.corpus) - offset) // self.length
        return offset + self.length * random.permutation(count)

    def next_positions(self) -> np.ndarray:
        """Where the next batch's windows begin [batch_size]; a batch may span two epochs."""
        taken: list[np.ndarray] = []
        needed = self.batch_size
        while needed:
            if self._order is None:
                self._order = self._epoch_order()
            part = self._order[self.drawn : self.drawn + needed]
            taken.append(part)
            self.drawn += len(part)
            needed -= len(part)
            if self.drawn == len(self._order):
                self.epoch, self.drawn, self._order = self.epoch + 1, 0, None
        return np.concatenate(taken)

    def next_batch(self, device: torch.device | str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets, int64 [batch_size, length], on the device; does not wait for it."""
        inputs, targets = self.corpus.windows(self.next_positions(), self.length)
        return _to_device(inputs, device), _to_device(targets, device)

    def next_bytes(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """The targets of next_batch alone, which then cost an eighth of the transfer."""
        return _to_device(self.corpus.bytes_at(self.next_positions(), self.length), device).long()

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "drawn": self.drawn}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.drawn, self._order = state["epoch"], state["drawn"], None


def _to_device(array: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """On a GPU without waiting for it."""
    batch = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return batch.pin_memory().to(device, non_blocking=True)
    return batch
