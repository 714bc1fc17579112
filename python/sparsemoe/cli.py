"""The command line: ``sparsemoe demo | train | generate | evaluate | bench | info``."""

from __future__ import annotations

import argparse
import codecs
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

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
    if arguments[:1] and arguments[0] in ("train", "bench", "demo"):
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
    for add in (_add_demo, _add_train, _add_generate, _add_evaluate, _add_bench, _add_info):
        add(commands)
    return parser


def _command(commands: Any, name: str, run: Any, help: str, **options: Any) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    parser.set_defaults(run=run)
    return parser


def _add_device(parser: Any) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one"
    )


OVERRIDES_HELP = """\
Any key of the config can be set on the command line, for example
  model.hidden_size=256 model.num_experts=16 train.learning_rate=2e-3
A misspelt key is refused, and the nearest known key named."""


def _add_demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        run_demo,
        "train a small model on Python's own library, in three minutes",
        description="Trains a small mixture-of-experts model on the source of Python's own\n"
        "library, which every machine has, and shows what it learnt: a sample of its\n"
        "text, and its bits per byte on files it never saw, beside those of xz -9.",
        epilog=OVERRIDES_HELP,
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
    _add_device(parser)


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
    parser = _command(
        commands,
        "train",
        run_train,
        "train a model on your own files",
        usage="sparsemoe train [--config FILE] [--data PATH ...] [--out DIR] [--resume] "
        "[section.key=value ...]",
        description="Trains a model on the bytes of any files. A part of the files is held out\n"
        "to validate on. Checkpoints and metrics go to the run's folder. Ctrl-C ends the run\n"
        "after the step at hand, with a checkpoint; again Ctrl-C ends it at once.",
        epilog=OVERRIDES_HELP
        + """

examples
  sparsemoe train --config demo --data ~/src/project --out runs/project
  sparsemoe train --out runs/project --resume train.steps=20000""",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="a YAML file, or the name of a config that comes along: demo, demo_gpu",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files and folders (default: data.paths of the config; else Python's own library)",
    )
    parser.add_argument("--out", default="runs/train", metavar="DIR", help="default: runs/train")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, with its config unless --config is given",
    )


def run_train(args: argparse.Namespace) -> None:
    import yaml

    from sparsemoe.train import checkpoint
    from sparsemoe.train.config import (
        ConfigError,
        RunConfig,
        apply_overrides,
        from_dict,
        load_config,
        load_data,
        to_dict,
    )
    from sparsemoe.train.progress import make_progress
    from sparsemoe.train.trainer import Trainer

    out = Path(args.out)
    saved = checkpoint.newest(out / "checkpoints")
    if args.resume and saved is None:
        raise checkpoint.CheckpointError(f"no complete checkpoint in {out} to resume from")
    if saved and not args.resume:
        raise ConfigError(
            f"{out} holds a run; add --resume to go on with it, or choose another --out"
        )
    if saved and args.config is None:
        config = from_dict(RunConfig, apply_overrides(saved.info["config"], args.overrides))
    else:
        config = load_config(args.config, args.overrides)
    if args.data:
        config.data.paths = args.data
    train, held_out = load_data(config.data)
    print(f"{len(train):,} bytes to train on, {len(held_out):,} held out", flush=True)
    trainer = Trainer(config, train, held_out, out)
    if saved:
        trainer.resume(saved)
        print(f"resumed {saved.path} at step {saved.step}")
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.yaml").write_text(yaml.safe_dump(to_dict(config)), encoding="utf-8")
    with _gentle_stop(trainer), make_progress() as trainer.progress:
        trainer.fit()
    print(f"step {trainer.step}; checkpoints and metrics are in {out}")


@contextlib.contextmanager
def _gentle_stop(trainer: Any) -> Iterator[None]:
    """The first Ctrl-C ends training after the step at hand, with a checkpoint."""

    def stop(*_: object) -> None:
        trainer.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        run_generate,
        "let a trained model write",
        description="Writes the prompt and what the model puts after it.",
        epilog='example\n  sparsemoe generate --checkpoint runs/demo --prompt "def main("',
    )
    _add_checkpoint(parser)
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
    _add_device(parser)


def _add_checkpoint(parser: Any) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder (its newest checkpoint is taken), or one checkpoint's folder",
    )


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
    parser = _command(
        commands,
        "evaluate",
        run_evaluate,
        "bits per byte of a trained model",
        description="Predicts every byte of some files once, and prints the mean number of bits\n"
        "that a byte cost, beside what xz -9 needs for the same bytes.",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files and folders, all of them (default: the files held out in training)",
    )
    parser.add_argument("--max-bytes", type=int, help="about how many to predict (default: all)")
    parser.add_argument(
        "--overlap", type=int, help="least context of a prediction (default: half the context)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    _add_device(parser)


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
    parser = _command(
        commands,
        "bench",
        run_bench,
        "how fast a config trains and generates on this machine",
        usage="sparsemoe bench [--config FILE] [--steps N] [--json] [section.key=value ...]",
        description="Measures training, evaluation and generation of a config's model on\n"
        "Python's own library. The operations by themselves are measured, in a checkout of\n"
        "the repository, by: pytest bench --benchmark-only",
        epilog=OVERRIDES_HELP,
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
    parser = _command(
        commands, "info", run_info, "versions, and what this build and machine can do"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run_info(args: argparse.Namespace) -> None:
    from sparsemoe.info import build_info, format_info

    info = build_info()
    print(json.dumps(info) if args.json else format_info(info))


if __name__ == "__main__":
    sys.exit(main())
