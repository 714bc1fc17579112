"""``sparsemoe codec train | eval``: Vyra's byte codec."""

from __future__ import annotations

import argparse
import json
from typing import Any

from sparsemoe.cli_run import (
    add_checkpoint,
    add_device,
    add_files,
    add_run,
    command,
    overrides_help,
    train,
)


def add_codec(commands: Any) -> None:
    parser = command(
        commands,
        "codec",
        None,
        "train a codec that turns bytes into few codes, and measure it",
        description="A codec turns each patch of bytes (8 by default) into a few codes, and codes\n"
        "back into bytes.",
        epilog="'sparsemoe codec train --help' and 'sparsemoe codec eval --help' explain each.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_train(actions)
    _add_eval(actions)


def _add_train(actions: Any) -> None:
    parser = command(
        actions,
        "train",
        run_train,
        "train a codec on your own files",
        usage="sparsemoe codec train [--config FILE] [--data PATH ...] [--minutes M] [--out DIR]\n"
        "       [--resume] [section.key=value ...]",
        description="Trains a codec on the bytes of any files. A part of the files is held out to\n"
        "validate on. Checkpoints and metrics go to the run's folder. Ctrl-C ends the run after\n"
        "the step at hand, with a checkpoint; again Ctrl-C ends it at once.",
        epilog=overrides_help("model.compression_ratio=16")
        + """

examples
  sparsemoe codec train --config codec --out runs/codec
  sparsemoe codec train --config codec_gpu --data ~/src --minutes 15 --out runs/big
  sparsemoe codec train --out runs/codec --resume --minutes 6""",
    )
    add_run(parser, configs="codec, codec_gpu", out="runs/codec")
    parser.add_argument(
        "--minutes",
        type=float,
        metavar="M",
        help="train for so long, earlier sessions included; the learning rate follows the clock",
    )


def run_train(args: argparse.Namespace) -> None:
    from sparsemoe.train.config import CodecRunConfig

    if args.minutes is not None:
        args.overrides = [*args.overrides, f"train.minutes={args.minutes}"]
    train(args, CodecRunConfig)


def _add_eval(actions: Any) -> None:
    parser = command(
        actions,
        "eval",
        run_eval,
        "how well a trained codec reconstructs, and what its codes cost",
        description="Encodes and decodes some files: how many bytes come back right, and how many\n"
        "bits the codes and the rest cost, by the number of stages and beside xz and zstd.",
    )
    add_checkpoint(parser)
    add_files(parser)
    parser.add_argument("--max-bytes", type=int, help="about how many to measure (default: all)")
    parser.add_argument(
        "--tries",
        type=int,
        default=0,
        help="look so many times for codes that decode better where bytes come back wrong; each\n"
        "costs as much as decoding (default: 0)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(parser)


def run_eval(args: argparse.Namespace) -> None:
    from sparsemoe.data import load_corpus
    from sparsemoe.evaluate import evaluate_codec
    from sparsemoe.evaluate.codec_report import compressors, format_evaluation
    from sparsemoe.train.checkpoint import CheckpointError
    from sparsemoe.train.config import CodecRunConfig, ConfigError, load_data
    from sparsemoe.train.device import choose_device, choose_precision
    from sparsemoe.train.trainer import load_model

    if args.tries < 0:
        raise ConfigError(f"--tries must be 0 or more, got {args.tries}")
    device = choose_device(args.device)
    model, config = load_model(args.checkpoint, device, CodecRunConfig)
    if not model.quantizing:
        raise CheckpointError(f"{args.checkpoint} does not quantize yet; train it longer")
    if args.data:
        corpus = load_corpus(args.data, config.data.suffixes, config.data.exclude)
    else:
        corpus = load_data(config.data)[1]
    precision = choose_precision(config.train.precision, device)
    result = evaluate_codec(
        model, corpus, max_bytes=args.max_bytes, precision=precision, tries=args.tries
    )
    others = compressors(corpus)
    if args.json:
        print(json.dumps({**result.to_dict(), "precision": precision, **others}))
    else:
        print(format_evaluation(result, others))
