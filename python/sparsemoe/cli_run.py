"""What several commands of the command line share: their options, and how they train."""

from __future__ import annotations

import argparse
import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def overrides_help(model: str = "model.hidden_size=256 model.num_experts=16") -> str:
    """What the help of a command says that takes overrides; ``model`` is an example of them."""
    return f"""\
Any key of the config can be set on the command line, for example
  {model} train.learning_rate=2e-3
A misspelt key is refused, and the nearest known key named."""


def command(commands: Any, name: str, run: Any, help: str, **options: Any) -> Any:
    parser = commands.add_parser(
        name,
        help=help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_device(parser: Any) -> None:
    parser.add_argument(
        "--device", default="auto", help="cpu, cuda, cuda:1, ...; auto is a GPU where there is one"
    )


def add_files(parser: Any) -> None:
    """Those to evaluate on."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files and folders, all of them (default: the files held out in training)",
    )


def add_checkpoint(parser: Any) -> None:
    parser.add_argument(
        "--checkpoint",
        required=True,
        metavar="DIR",
        help="a run's folder (its newest checkpoint is taken), or one checkpoint's folder",
    )


def add_run(parser: Any, configs: str, out: str) -> None:
    """What every command that trains takes."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        help=f"a YAML file, or the name of a config that comes along: {configs}",
    )
    parser.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="files and folders (default: data.paths of the config; else Python's own library)",
    )
    parser.add_argument("--out", default=out, metavar="DIR", help=f"default: {out}")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, with its config unless --config is given",
    )


def train(args: argparse.Namespace, config_type: Any) -> Any:
    """Trains or resumes what the arguments of add_run say; returns the Trainer."""
    import yaml

    from sparsemoe.train import checkpoint
    from sparsemoe.train.config import (
        ConfigError,
        apply_overrides,
        from_dict,
        load_config,
        load_data,
        to_dict,
    )
    from sparsemoe.train.progress import make_progress
    from sparsemoe.train.trainer import Trainer, check_kind

    out = Path(args.out)
    saved = checkpoint.newest(out / "checkpoints")
    if args.resume and saved is None:
        raise checkpoint.CheckpointError(f"no complete checkpoint in {out} to resume from")
    if saved and not args.resume:
        raise ConfigError(
            f"{out} holds a run; add --resume to go on with it, or choose another --out"
        )
    if saved:
        check_kind(saved, config_type)
    if saved and args.config is None:
        config = from_dict(config_type, apply_overrides(saved.info["config"], args.overrides))
    else:
        config = load_config(args.config, args.overrides, config_type)
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
    with gentle_stop(trainer), make_progress() as trainer.progress:
        trainer.fit()
    print(f"step {trainer.step}; checkpoints and metrics are in {out}")
    return trainer


@contextlib.contextmanager
def gentle_stop(trainer: Any) -> Iterator[None]:
    """The first Ctrl-C ends training after the step at hand, with a checkpoint."""

    def stop(*_: object) -> None:
        trainer.stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
