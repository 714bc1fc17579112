"""``sparsemoe demo``: train a small model on Python's own library, and see what it learnt."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from sparsemoe.data import Corpus, load_standard_library
from sparsemoe.evaluate import bits_per_byte, plot_runs, xz_bits_per_byte
from sparsemoe.generate import Sampling, generate
from sparsemoe.info import build_info
from sparsemoe.models.moe_lm import MoELM
from sparsemoe.train.config import ConfigError, RunConfig, load_config, to_dict
from sparsemoe.train.device import choose_device
from sparsemoe.train.progress import make_progress
from sparsemoe.train.trainer import Trainer

PROMPT = b"import os\n\n\ndef "
SAMPLE_BYTES = 320
MARKER = "demo.json"  # a folder that has it was written by the demo, which may write it anew


@dataclass
class Result:
    """What one model came to."""

    params: int
    active_params: int
    flops_per_token: float
    bytes_trained: int
    bytes_per_second: float
    bits_per_byte: float


def demo(
    out: str | Path = "runs/demo",
    minutes: float = 3.0,
    seed: int = 0,
    compare_dense: bool = False,
    device: str = "auto",
    overrides: tuple[str, ...] = (),
) -> dict[str, Result]:
    """Runs the demo and prints what it does.

    out            folder for checkpoint, metrics, plot.png and demo.json
    minutes        for all of it, the dense model apart
    compare_dense  then also trains a dense model of equal FLOPs a token on as many tokens

    Raises ConfigError where ``out`` is a folder with something else in it.
    """
    started = time.monotonic()
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).exists():
            raise ConfigError(f"{out} is not empty, and not a demo's; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("{}\n", encoding="utf-8")

    gpu = choose_device(device).type == "cuda"
    config = load_config(
        "demo_gpu" if gpu else "demo", [f"train.seed={seed}", f"train.device={device}", *overrides]
    )
    train, held_out = load_standard_library(config.data.held_out, config.data.library_tests)
    xz = xz_bits_per_byte(held_out)
    print(
        f"Python's own library: {len(train):,} bytes in {len(train.names)} files to train on, "
        f"{len(held_out):,} bytes in {len(held_out.names)} files held out"
    )
    print(f"everything is written to {out}\n")

    trainer = _make_trainer("mixture of experts", config, train, held_out, out)
    deadline = started + minutes * 60
    deadline -= _seconds_after_training(trainer, held_out, minutes * 60)
    results = {"mixture of experts": _train(trainer, held_out, deadline)}
    runs = {"mixture of experts": trainer.records}
    _print_sample(trainer.model, seed)

    if compare_dense:
        dense = replace(
            config,
            model=config.model.dense_equivalent(),
            train=replace(config.train, minutes=None, steps=trainer.step),
        )
        other = _make_trainer("dense", dense, train, held_out, out / "dense")
        results["dense"] = _train(other, held_out)
        runs["dense"] = other.records

    plot = plot_runs(out / "plot.png", runs, xz)
    _print_results(results, held_out, xz, config)
    print(f"\nloss and expert load: {plot}")
    print(f'more text: sparsemoe generate --checkpoint {out} --prompt "class "')
    summary = {name: vars(result) for name, result in results.items()} | {
        "xz_bits_per_byte": xz,
        "held_out_bytes": len(held_out),
        "minutes": minutes,
        "date": date.today().isoformat(),
        "device": trainer.device.type,
        "build": build_info(),
        "config": to_dict(config),
    }
    (out / MARKER).write_text(json.dumps(summary, indent=1), encoding="utf-8")
    return results


def _make_trainer(
    name: str, config: RunConfig, train: Corpus, held_out: Corpus, out: Path
) -> Trainer:
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    trainer = Trainer(config, train, held_out, out)
    model = config.model
    print(
        f"{name}: {model.num_params() / 1e6:.2f} million parameters, "
        f"{model.active_params() / 1e6:.2f} million active in a token; "
        f"{trainer.device.type}, {trainer.precision}"
    )
    return trainer


def _seconds_after_training(trainer: Trainer, held_out: Corpus, seconds: float) -> float:
    """What to set aside of ``seconds`` for evaluation, sample and plot: measured, the best of
    three passes (a busy machine may stall any one), and a quarter at most."""

    def best(work: Callable[[], object]) -> float:
        times = []
        for _ in range(3):
            started = time.monotonic()
            work()
            times.append(time.monotonic() - started)
        return min(times)

    model, precision = trainer.model, trainer.precision
    part = min(8192, len(held_out))
    evaluation = best(lambda: bits_per_byte(model, held_out, max_bytes=part, precision=precision))
    last_validation = trainer.config.train.validation_bytes / 2  # without overlap: half the work
    needed = evaluation * (len(held_out) + last_validation) / part
    needed += best(lambda: list(generate(model, PROMPT, 8))) * SAMPLE_BYTES / 8
    return min(1.2 * needed + 6.0, seconds / 4)  # 6: start and plot


def _train(trainer: Trainer, held_out: Corpus, deadline: float | None = None) -> Result:
    with make_progress() as trainer.progress:
        trainer.fit(deadline)
    evaluation = bits_per_byte(trainer.model, held_out, precision=trainer.precision)
    model, trained = trainer.config.model, trainer.step * trainer.bytes_per_step
    return Result(
        model.num_params(),
        model.active_params(),
        model.flops_per_token(),
        trained,
        trained / trainer.seconds,
        evaluation.bits_per_byte,
    )


def _print_sample(model: MoELM, seed: int) -> None:
    text = PROMPT + bytes(generate(model, PROMPT, SAMPLE_BYTES, Sampling(seed=seed)))
    print("\n--- a sample " + "-" * 47)
    print(text.decode("utf-8", errors="replace"))
    print("-" * 60 + "\n", flush=True)


def _print_results(
    results: dict[str, Result], held_out: Corpus, xz: float, config: RunConfig
) -> None:
    rows: list[tuple[str, Any]] = [
        ("parameters", lambda r: f"{r.params:,}"),
        ("active in a token", lambda r: f"{r.active_params:,}"),
        ("FLOPs a token, forward", lambda r: f"{r.flops_per_token:,.0f}"),
        ("bytes trained on", lambda r: f"{r.bytes_trained:,}"),
        ("bytes a second", lambda r: f"{r.bytes_per_second:,.0f}"),
        ("bits per byte, held-out", lambda r: f"{r.bits_per_byte:.3f}"),
    ]
    print(" " * 26 + "".join(f"{name:>22}" for name in results))
    for label, value in rows:
        print(f"{label:26}" + "".join(f"{value(r):>22}" for r in results.values()))
    print(f"{'xz -9 on the same bytes':26}{xz:>22.3f}")
    context = config.model.context
    print(
        f"\nheld-out: all {len(held_out):,} bytes, each predicted once from "
        f"{context // 2} to {context - 1} bytes before it"
    )
