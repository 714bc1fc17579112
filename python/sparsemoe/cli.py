"""The command line: ``sparsemoe demo | train | generate | evaluate | codec | bench | info``."""

from __future__ import annotations

import argparse
import codecs
import json
import os
import re
import sys
from collections.abc import Sequence
from typing import Any

from sparsemoe.cli_codec import add_codec
from sparsemoe.cli_run import (
    add_checkpoint,
    add_device,
    add_files,
    add_run,
    command,
    overrides_help,
    train,
)

OVERRIDE = re.compile(r"[A-Za-z_]\w*(\.\w+)+=")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status, 1 where the user can put something right."""
    from sparsemoe.data import DataError
    from sparsemoe.train.checkpoint import CheckpointError
    from sparsemoe.train.config import ConfigError
    from sparsemoe.train.trainer import TrainError

    args = parse(sys.argv[1:] if arguments is None else list(arguments))
    try:
        args.run(args)
    except (ConfigError, DataError, CheckpointError, TrainError) as error:
        print(f"sparsemoe {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\nsparsemoe {args.command}: stopped", file=sys.stderr)
        return 130
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    """Arguments as a namespace. ``section.key=value`` may stand anywhere among them."""
    overrides = []
    if arguments[:1] in (["train"], ["bench"], ["demo"]) or arguments[:2] == ["codec", "train"]:
        overrides = [a for a in arguments if OVERRIDE.match(a) and not os.path.exists(a)]
        arguments = [a for a in arguments if a not in overrides]
    args = make_parser().parse_args(arguments)
    args.overrides = overrides
    return args


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sparsemoe",
        description="Mixture-of-experts language models on bytes: train them, and use them.",
        epilog="'sparsemoe COMMAND --help' explains one command. To begin: sparsemoe demo",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_train(commands)
    _add_generate(commands)
    _add_evaluate(commands)
    add_codec(commands)
    _add_bench(commands)
    _add_info(commands)
    return parser


def _add_demo(commands: Any) -> None:
    parser = command(
        commands,
        "demo",
        run_demo,
        "train a small model on Python's own library, in three minutes",
        description="Trains a small mixture-of-experts model on the source of Python's own\n"
        "library, which every machine has, and shows what it learnt: a sample of its\n"
        "text, and its bits per byte on files it never saw, beside those of xz -9.",
        epilog=overrides_help(),
    )
    parser.add_argument(
        "--compare-dense",
        action="store_true",
        help="also train a dense model of the same FLOPs a token on as many tokens",
    )
    parser.add_argument(
        "--minutes", type=float, default=3.0, help="time for all but the dense model (default: 3)"
    )
    parser.add_argument("--out", default="runs/demo", help="folder to write (default: runs/demo)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of weights and data order (default: 0)"
    )
    add_device(parser)


def run_demo(args: argparse.Namespace) -> None:
    from sparsemoe.demo import demo

    demo(
        out=args.out,
        minutes=args.minutes,
        seed=args.seed,
        compare_dense=args.compare_dense,
        device=args.device,
        overrides=tuple(args.overrides),
    )


def _add_train(commands: Any) -> None:
    parser = command(
        commands,
        "train",
        run_train,
        "train a model on your own files",
        usage="sparsemoe train [--config FILE] [--data PATH ...] [--out DIR] [--resume] "
        "[section.key=value ...]",
        description="Trains a model on the bytes of any files. A part of the files is held out\n"
        "to validate on. Checkpoints and metrics go to the run's folder. Ctrl-C ends the run\n"
        "after the step at hand, with a checkpoint; again Ctrl-C ends it at once.",
        epilog=overrides_help()
        + """

examples
  sparsemoe train --config demo --data ~/src/project --out runs/project
  sparsemoe train --out runs/project --resume train.steps=20000""",
    )
    add_run(parser, configs="demo, demo_gpu", out="runs/train")


def run_train(args: argparse.Namespace) -> None:
    from sparsemoe.train.config import RunConfig

    train(args, RunConfig)


def _add_generate(commands: Any) -> None:
    parser = command(
        commands,
        "generate",
        run_generate,
        "let a trained model write",
        description="Writes the prompt and what the model puts after it.",
        epilog='example\n  sparsemoe generate --checkpoint runs/demo --prompt "def main("',
    )
    add_checkpoint(parser)
    parser.add_argument("--prompt", default="", help="text to go on from (default: none)")
    parser.add_argument("--bytes", type=int, default=500, help="how many to write (default: 500)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        help="0: the likeliest byte each time; default 0.8",
    )
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest bytes only")
    parser.add_argument(
        "--top-p", type=float, default=0.95, help="draw from the likeliest share p (default: 0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same text")
    add_device(parser)


def run_generate(args: argparse.Namespace) -> None:
    from sparsemoe.generate import Sampling, generate
    from sparsemoe.train.config import ConfigError
    from sparsemoe.train.device import choose_device
    from sparsemoe.train.trainer import load_model

    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    model, _ = load_model(args.checkpoint, choose_device(args.device))
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    print(args.prompt, end="", flush=True)
    prompt = args.prompt.encode("utf-8", errors="surrogateescape")
    for byte in generate(model, prompt, args.bytes, sampling):
        print(decoder.decode(bytes([byte])), end="", flush=True)
    print(decoder.decode(b"", final=True))


def _add_evaluate(commands: Any) -> None:
    parser = command(
        commands,
        "evaluate",
        run_evaluate,
        "bits per byte of a trained model",
        description="Predicts every byte of some files once, and prints the mean number of bits\n"
        "that a byte cost, beside what xz -9 needs for the same bytes.",
    )
    add_checkpoint(parser)
    add_files(parser)
    parser.add_argument("--max-bytes", type=int, help="about how many to predict (default: all)")
    parser.add_argument(
        "--overlap", type=int, help="least context of a prediction (default: half the context)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(parser)


def run_evaluate(args: argparse.Namespace) -> None:
    from sparsemoe.data import load_corpus
    from sparsemoe.evaluate import bits_per_byte, xz_bits_per_byte
    from sparsemoe.train.config import load_data
    from sparsemoe.train.device import choose_device, choose_precision
    from sparsemoe.train.trainer import load_model

    device = choose_device(args.device)
    model, config = load_model(args.checkpoint, device)
    if args.data:
        corpus = load_corpus(args.data, config.data.suffixes, config.data.exclude)
    else:
        corpus = load_data(config.data)[1]
    precision = choose_precision(config.train.precision, device)
    result = bits_per_byte(
        model, corpus, overlap=args.overlap, max_bytes=args.max_bytes, precision=precision
    )
    values = {**vars(result), "precision": precision, "xz_bits_per_byte": xz_bits_per_byte(corpus)}
    if args.json:
        print(json.dumps(values))
        return
    print(f"{result.bits_per_byte:.4f} bits per byte over {result.bytes:,} bytes, each predicted")
    print(f"once from {result.overlap} to {result.context - 1} bytes before it, in {precision}")
    print(f"{values['xz_bits_per_byte']:.4f} bits per byte: xz -9, on all {len(corpus):,} bytes")


def _add_bench(commands: Any) -> None:
    parser = command(
        commands,
        "bench",
        run_bench,
        "how fast a config trains and generates on this machine",
        usage="sparsemoe bench [--config FILE] [--steps N] [--json] [section.key=value ...]",
        description="Measures training, evaluation and generation of a config's model on\n"
        "Python's own library. The operations by themselves are measured, in a checkout of\n"
        "the repository, by: pytest bench --benchmark-only",
        epilog=overrides_help(),
    )
    parser.add_argument("--config", metavar="FILE", help="default: the demo's for this machine")
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: 20)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_bench(args: argparse.Namespace) -> None:
    from sparsemoe.evaluate.speed import measure_speed
    from sparsemoe.train.config import load_config, load_data
    from sparsemoe.train.device import choose_device

    name = args.config or ("demo_gpu" if choose_device().type == "cuda" else "demo")
    config = load_config(name, args.overrides)
    values = measure_speed(config, *load_data(config.data), steps=max(1, args.steps))
    if args.json:
        print(json.dumps(values))
        return
    for key, value in values.items():
        print(f"{key.replace('_', ' '):28} {value if isinstance(value, str) else f'{value:,.0f}'}")


def _add_info(commands: Any) -> None:
    parser = command(commands, "info", run_info, "versions, and what this build and machine can do")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_info(args: argparse.Namespace) -> None:
    from sparsemoe.info import build_info, format_info

    info = build_info()
    print(json.dumps(info) if args.json else format_info(info))


if __name__ == "__main__":
    sys.exit(main())
