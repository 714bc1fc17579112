"""A model and data small enough that a test trains it in a second."""

from pathlib import Path

import pytest
import torch

from sparsemoe.models.moe_lm import MoELMConfig
from sparsemoe.train.config import DataConfig, RunConfig, TrainConfig

SIZES = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "num_kv_heads": 1,
    "head_dim": 16,
    "context": 32,
    "num_experts": 4,
    "expert_size": 16,
    "dense_size": 32,
}
TRAIN = {
    "steps": 8,
    "batch_size": 4,
    "warmup_steps": 2,
    "log_every": 2,
    "validate_every": 0,
    "device": "cpu",
    "precision": "float32",
}
SHORT = [  # of a command
    "train.steps=6",
    "train.batch_size=2",
    "train.log_every=2",
    "train.validate_every=0",
    "train.device=cpu",
    "data.held_out=0.2",
]
OVERRIDES = [f"model.{name}={size}" for name, size in SIZES.items()]


def tiny_model(**changes) -> MoELMConfig:
    return MoELMConfig(**{**SIZES, **changes})


def tiny_run(model: dict | None = None, **train) -> RunConfig:
    settings = TrainConfig(**{**TRAIN, **train})
    return RunConfig(tiny_model(**(model or {})), DataConfig(), settings)


@pytest.fixture(autouse=True)
def one_thread():
    """A model this small is slower on two threads, and much slower beside other programs."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_files(folder: Path, count: int = 12) -> Path:
    """A folder of small, different Python files."""
    for i in range(count):
        file = folder / f"part{i % 3}" / f"file{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"def function_{i}_{j}(x):\n    return x + {i * j}\n" for j in range(20)]
        file.write_text("\n".join(lines))
    return folder
