"""Ways of balancing experts, compared: python -m bench.routers --out DIR --steps N --seeds 0 1 2

Trains the byte language model on the source of Python's own library with each way and seed, and
measures it on the files held out. DIR gets one file a way and seed as soon as it is measured; what
is there already with the same settings is passed over, so that a run that was stopped goes on, and
several processes may share the work with --only and --seeds. Then, with the machine to itself:

    python -m bench.routers --out DIR --steps N --time     # what a training step takes
    python -m bench.routers --render                       # docs/routing.md, of all results
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import timing
from sparsemoe.data import BatchSampler, Corpus
from sparsemoe.evaluate import bits_per_byte
from sparsemoe.models.moe_lm import MoELM
from sparsemoe.nn import SinkhornRouter
from sparsemoe.train.config import RunConfig, load_config, load_data, to_dict
from sparsemoe.train.device import autocast, choose_device
from sparsemoe.train.progress import Progress
from sparsemoe.train.task import Aux, LanguageModelTask
from sparsemoe.train.trainer import Trainer

LOAD_BALANCE_WEIGHT = 0.01
BIAS_RATE = 0.001
LAST_STEPS = 50  # over which the load in training is taken
TIMES = "time.json"


@dataclass(frozen=True)
class Way:
    """One way of balancing: what it changes in the model's config, and its rows of the table, each
    with how a Sinkhorn router then chooses at inference."""

    model: Mapping[str, Any]
    rows: Mapping[str, str | None]


SINKHORN = {"router": "sinkhorn", "load_balance_weight": 0.0}
WAYS = {
    "topk": Way({"load_balance_weight": 0.0}, {"top-k, no balancing": None}),
    "topk-loss": Way(
        {"load_balance_weight": LOAD_BALANCE_WEIGHT}, {"top-k, load-balance loss": None}
    ),
    "topk-bias": Way(
        {"load_balance_weight": 0.0, "expert_bias_rate": BIAS_RATE}, {"loss-free bias": None}
    ),
    "sinkhorn": Way(
        SINKHORN,
        {"Sinkhorn, top-k at inference": "topk", "Sinkhorn, learned bias at inference": "bias"},
    ),
    "sinkhorn-sequence": Way(
        {**SINKHORN, "sinkhorn_per_sequence": True},
        {
            "Sinkhorn per sequence, top-k at inference": "topk",
            "Sinkhorn per sequence, learned bias at inference": "bias",
        },
    ),
    "expert-choice": Way(
        {"router": "expert_choice", "load_balance_weight": 0.0}, {"expert choice": None}
    ),
}


class Watched(LanguageModelTask):
    """Keeps how many pairs each expert got in the last steps, on the device."""

    def __init__(self, config: RunConfig) -> None:
        super().__init__(config)
        self.counts: deque[Tensor] = deque(maxlen=LAST_STEPS)  # each [micro-batches, layers, E]

    def after_step(self, model: nn.Module, batches: Sequence[Aux]) -> None:
        super().after_step(model, batches)
        self.counts.append(torch.stack([aux["counts"] for aux in batches]))


class Lines(Progress):
    """A line now and then, with a name before it."""

    def __init__(self, name: str, every: float) -> None:
        self.name, self.every, self.last = name, every, time.monotonic()

    def update(self, record: dict[str, Any]) -> None:
        if time.monotonic() - self.last >= self.every:
            self.last = time.monotonic()
            done = f"step {record['step']}/{record['total_steps']}"
            tell(f"{self.name}: {done}, {record['bits_per_byte']:.3f} bits per byte in training")


def tell(text: str) -> None:
    print(text, flush=True)


def largest_load(counts: Tensor) -> float:
    """counts [batches, layers, E] -> the most loaded expert's load over the mean load, averaged
    over layers and batches."""
    counts = counts.double()
    return (counts.amax(-1) / counts.mean(-1).clamp(min=1e-9)).mean().item()


def dropped_share(counts: Tensor, tokens: int, top_k: int) -> float:
    """The share of pairs beyond ceil(1.25 * tokens * k / E) in an expert, averaged likewise."""
    capacity = -(-5 * tokens * top_k // (4 * counts.shape[-1]))
    over = (counts - capacity).clamp(min=0).sum(-1).double()
    return (over / counts.sum(-1).clamp(min=1)).mean().item()


@torch.no_grad()
def held_out_counts(trainer: Trainer) -> Tensor:
    """[batches, layers, E]: the pairs of the held-out text, in batches as in training."""
    config, device = trainer.config, trainer.device
    length, size = config.model.context, config.train.batch_size
    sampler = BatchSampler(trainer.held_out, length, size)
    counts = []
    trainer.model.eval()
    for _ in range(max(1, (len(trainer.held_out) - length) // (length * size))):
        with autocast(device, trainer.precision):
            counts.append(trainer.model(sampler.next_batch(device)[0])[1]["counts"])
    trainer.model.train()
    return torch.stack(counts)


def choose_at_inference(model: MoELM, how: str) -> None:
    for module in model.modules():
        if isinstance(module, SinkhornRouter):
            module.inference = how


def train_and_measure(
    way: str, config: RunConfig, train: Corpus, held_out: Corpus, every: float
) -> dict[str, Any]:
    """Trains one way from one seed: what the table says of it."""
    name = f"{way}, seed {config.train.seed}"
    trainer = Trainer(config, train, held_out, progress=Lines(name, every))
    trainer.task = watched = Watched(config)
    trainer.fit()
    rows = {}
    tokens, top_k = config.train.batch_size * config.model.context, config.model.top_k
    for row, how in WAYS[way].rows.items():
        if how:
            choose_at_inference(trainer.model, how)
        counts = held_out_counts(trainer)
        rows[row] = {
            "bits per byte": bits_per_byte(
                trainer.model, held_out, precision=trainer.precision
            ).bits_per_byte,
            "largest load": largest_load(counts),
            "dropped": dropped_share(counts, tokens, top_k),
            "experts a token": (counts.sum(-1).double().mean() / tokens).item(),
        }
        tell(f"{name}: {row}: {rows[row]['bits per byte']:.3f} bits per byte")
    training = {
        "largest load": largest_load(torch.cat(tuple(watched.counts))),
        "bits per byte": trainer.records[-1]["bits_per_byte"],
    }
    return {"training": training, "rows": rows}


def step_times(
    configs: dict[str, RunConfig], train: Corpus, held_out: Corpus, turns: int, steps: int
) -> dict[str, list[float]]:
    """Milliseconds a training step of each way: one figure a turn of some steps."""
    trainers = {way: Trainer(config, train, held_out) for way, config in configs.items()}

    def clock(trainer: Trainer) -> float:
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        return time.perf_counter()

    times: dict[str, list[float]] = {way: [] for way in trainers}
    for turn in range(turns + 2):  # the first two warm up
        for way, trainer in trainers.items():
            start = clock(trainer)
            for _ in range(steps):
                trainer.train_step()
            if turn >= 2:
                times[way].append(1e3 * (clock(trainer) - start) / steps)
        tell(f"turn {turn + 1} of {turns + 2}")
    return times


def config_of(way: str, base: RunConfig, seed: int = 0) -> RunConfig:
    return replace(
        base,
        model=replace(base.model, **WAYS[way].model),
        train=replace(base.train, seed=seed),
    )


def settings_of(base: RunConfig, train: Corpus, held_out: Corpus) -> dict[str, Any]:
    """All that decides the results, apart from way and seed."""
    settings = to_dict(base)
    for name in ("seed", "device"):
        del settings["train"][name]
    settings["data"] = {
        "training bytes": len(train),
        "held-out bytes": len(held_out),
        "files": [train.fingerprint(), held_out.fingerprint()],
    }
    return settings


def environment(device: torch.device, commit: str | None) -> dict[str, Any]:
    gpu = device.type == "cuda"
    git = ("git", "describe", "--always", "--dirty", "--exclude=*")
    return {
        "device": torch.cuda.get_device_name(device) if gpu else timing._cpu_name(),
        "date": datetime.date.today().isoformat(),
        "commit": commit or timing._output(*git),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """The file is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def measured_with(path: Path, settings: dict[str, Any]) -> bool:
    return path.exists() and json.loads(path.read_text(encoding="utf-8"))["settings"] == settings


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="bench.routers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, metavar="DIR")
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), metavar="WAY")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--config", help="demo_gpu on a GPU, otherwise demo")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config")
    parser.add_argument("--commit", metavar="ID", help="what is measured, where git does not say")
    parser.add_argument("--every", type=float, default=10.0, help="seconds between two lines")
    parser.add_argument("--time", action="store_true", help="time training steps, train nothing")
    parser.add_argument("--turns", type=int, default=15, help="with --time")
    parser.add_argument("--render", action="store_true", help="write docs/routing.md")
    args = parser.parse_args(arguments)
    if args.render:
        from bench import routers_page

        routers_page.main()
        return
    if args.out is None:
        parser.error("--out DIR must be given, or --render")

    device = choose_device(args.device)
    run = (f"train.steps={args.steps}", "train.minutes=null", f"train.device={args.device}")
    quiet = ("train.validate_every=0", "train.save_every=0")
    base = load_config(
        args.config or ("demo_gpu" if device.type == "cuda" else "demo"),
        [*run, *quiet, *args.set],
    )
    train, held_out = load_data(base.data)
    settings = settings_of(base, train, held_out)
    head = {"settings": settings, "environment": environment(device, args.commit)}
    if args.time:
        configs = {way: config_of(way, base) for way in args.only}
        times = step_times(configs, train, held_out, args.turns, steps=5)
        medians = {way: statistics.median(found) for way, found in times.items()}
        write(args.out / TIMES, head | {"step ms": medians})
        tell(", ".join(f"{way} {ms:.1f} ms" for way, ms in medians.items()))
        return
    for seed in args.seeds:
        for way in args.only:
            path = args.out / f"{way}-{seed}.json"
            if measured_with(path, settings):
                tell(f"{way}, seed {seed}: measured already")
                continue
            config = config_of(way, base, seed)
            found = train_and_measure(way, config, train, held_out, args.every)
            write(path, {"way": way, "seed": seed, **head, **found})


if __name__ == "__main__":
    main()
