"""Train Vyra's codec on real text, and see how much of files it never saw comes back.

    python experiments/validate_codec.py --compression_ratio 8 --minutes 10

Prints accuracy and bits per byte beside xz and zstd, and writes into --out: metrics.jsonl (while it
trains), metrics.json and plot.png. The default text is the source of Python's own library.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from sparsemoe.cli_run import gentle_stop
from sparsemoe.data import DataError
from sparsemoe.evaluate import evaluate_codec
from sparsemoe.evaluate.codec_report import compressors, format_evaluation, plot_codec
from sparsemoe.info import build_info
from sparsemoe.train.config import (
    CodecRunConfig,
    ConfigError,
    RunConfig,
    load_config,
    load_data,
    to_dict,
)
from sparsemoe.train.device import choose_device
from sparsemoe.train.progress import make_progress
from sparsemoe.train.trainer import Trainer, TrainError


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--compression_ratio", type=int, default=8, help="bytes a patch: 2, 4, 8 or 16; default 8")
    add("--minutes", type=float, help="for all of it (default: train.minutes of the config)")
    add("--data", nargs="+", metavar="PATH", help="files and folders (default: Python's library)")
    add("--out", default="runs/validate_codec", metavar="DIR", help="default: %(default)s")
    add("--config", metavar="FILE", help="default: codec_gpu on a GPU, else codec")
    add(
        "--checkpoints",
        nargs="?",
        const="checkpoints",
        metavar="DIR",
        help="keep checkpoints, which may be large, in DIR (default: a folder in --out)",
    )
    add("--max-bytes", type=int, help="of held-out text to measure, about (default: all)")
    add("--tries", type=int, default=0, help="measure also the best of so many tries of codes")
    add("--seed", type=int, default=0, help="of weights and data order (default: 0)")
    add("--device", default="auto", help="cpu, cuda, ...; auto is a GPU where there is one")
    add("overrides", nargs="*", metavar="section.key=value", help="keys of the config")
    return parser.parse_args(arguments)


def make_config(args: argparse.Namespace) -> RunConfig:
    gpu = choose_device(args.device).type == "cuda"
    overrides = [
        f"model.compression_ratio={args.compression_ratio}",
        f"train.device={args.device}",
        f"train.seed={args.seed}",
    ]
    if args.minutes is not None:
        overrides.append(f"train.minutes={args.minutes}")
    name = args.config or ("codec_gpu" if gpu else "codec")
    config = load_config(name, [*overrides, *args.overrides], CodecRunConfig)
    if args.data:
        config.data.paths = args.data
    return config


def validate(args: argparse.Namespace) -> dict[str, Any]:
    """Runs the experiment; returns what metrics.json holds."""
    started = time.monotonic()
    config, out = make_config(args), Path(args.out)
    if args.tries < 0:
        raise ConfigError(f"--tries must be 0 or more, got {args.tries}")
    checkpoints = args.checkpoints and os.path.join(out.absolute(), args.checkpoints)
    train, held_out = load_data(config.data)
    print(f"{len(train):,} bytes to train on; {len(held_out):,} in other files held out")
    others = compressors(held_out)
    trainer = Trainer(config, train, held_out, out, checkpoints=checkpoints)
    parameters = sum(p.numel() for p in trainer.model.parameters())
    print(f"{parameters / 1e6:.2f} million parameters; {trainer.device}, {trainer.precision}")
    deadline = None
    if config.train.minutes:
        seconds = config.train.minutes * 60
        measured = min(args.max_bytes or len(held_out), len(held_out))
        aside = _seconds_of_evaluation(trainer, measured, seconds, args.tries)
        deadline = started + seconds - aside
    with gentle_stop(trainer), make_progress() as trainer.progress:
        trainer.fit(deadline)
    if not trainer.model.quantizing:
        raise TrainError(
            f"step {trainer.step} is too early: less than model.unquantized_accuracy "
            f"({config.model.unquantized_accuracy}) of the bytes came back before quantization"
        )
    result, *searched = (
        evaluate_codec(
            trainer.model,
            held_out,
            max_bytes=args.max_bytes,
            precision=trainer.precision,
            tries=tries,
        )
        for tries in (0, args.tries)[: 1 + (args.tries > 0)]
    )
    metrics = {
        **result.to_dict(),
        "searched": [found.to_dict() for found in searched],
        **others,
        "held_out_bytes": len(held_out),
        "held_out_files": len(held_out.names),
        "train_bytes": len(train),
        "parameters": parameters,
        "steps": trainer.step,
        "bytes_trained": trainer.step * trainer.bytes_per_step,
        "training_seconds": trainer.seconds,
        "seconds": time.monotonic() - started,
        "device": trainer.device.type,
        "precision": trainer.precision,
        "date": date.today().isoformat(),
        "build": build_info(),
        "config": to_dict(config),
    }
    (out / "metrics.json").write_text(json.dumps(metrics, indent=1), encoding="utf-8")
    plot = plot_codec(out / "plot.png", result, trainer.records, others, searched)
    print(
        f"\n{trainer.step:,} steps over {metrics['bytes_trained']:,} bytes in "
        f"{trainer.seconds:,.0f} s\n\n{format_evaluation(result, others)}\n\n"
        + "".join(f"{format_evaluation(found, others)}\n\n" for found in searched)
        + f"{out / 'metrics.json'}, {plot}"
    )
    return metrics


def _seconds_of_evaluation(trainer: Trainer, num_bytes: int, seconds: float, tries: int) -> float:
    """What to set aside of ``seconds`` for the evaluation and the plot: measured on a part, and a
    quarter at most, or a half with tries."""
    part = min(16 * trainer.config.model.context, num_bytes)
    times = []
    for _ in range(2):  # the first warms up
        started = time.monotonic()
        for each in {0, tries}:
            evaluate_codec(
                trainer.model,
                trainer.held_out,
                max_bytes=part,
                precision=trainer.precision,
                tries=each,
            )
        times.append(time.monotonic() - started)
    most = seconds / (2 if tries else 4)
    return min(1.3 * min(times) * num_bytes / part + 5.0, most)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status, 1 where the user can put something right."""
    args = parse(arguments)
    try:
        validate(args)
    except (ConfigError, DataError, TrainError) as error:
        print(f"validate_codec: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
