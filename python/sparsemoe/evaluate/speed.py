"""How fast a model trains, evaluates and generates on this machine."""

from __future__ import annotations

import time

import torch

from sparsemoe.data import Corpus
from sparsemoe.evaluate.bits import bits_per_byte
from sparsemoe.generate import generate
from sparsemoe.train.config import RunConfig
from sparsemoe.train.trainer import Trainer


def measure_speed(config: RunConfig, train: Corpus, held_out: Corpus, steps: int) -> dict:
    """Bytes (tokens) a second of training, evaluation and generation.

    Three steps warm up and are not counted; generation is of one sequence. Returns the rates,
    the training's FLOP/s of matrix operations, and the device and precision they are of.
    """
    trainer = Trainer(config, train, held_out)
    precision, device = trainer.precision, trainer.device

    def wait() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    trainer.model.train()
    for _ in range(3):
        trainer.train_step()
    start = wait()
    for _ in range(steps):
        trainer.train_step()
    training = steps * trainer.bytes_per_step / (wait() - start)
    evaluated = 0
    start = wait()
    for _ in range(2):  # the first pass warms up
        start = wait()
        evaluated = bits_per_byte(
            trainer.model, held_out, overlap=0, max_bytes=65536, precision=precision
        ).bytes
    evaluation = evaluated / (wait() - start)
    start = wait()
    generated = len(list(generate(trainer.model, b"def ", 64)))
    generation = generated / (wait() - start)
    return {
        "device": device.type,
        "precision": precision,
        "training_bytes_per_second": training,
        "evaluation_bytes_per_second": evaluation,
        "generation_bytes_per_second": generation,
        "training_flops_per_second": training * config.model.flops_per_token(training=True),
    }
