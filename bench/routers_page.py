"""docs/routing.md, from the folders in bench/results/routers."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.routers import BIAS_RATE, LAST_STEPS, LOAD_BALANCE_WEIGHT, TIMES, WAYS
from sparsemoe.models.moe_lm import MoELMConfig

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "routers"
PAGE = ROOT / "docs" / "routing.md"

HEAD = f"""# Routing

Made by `python -m bench.routers --render` from the files in `bench/results/routers`; do not edit.

A byte language model is trained on the source of Python's own library, with each way of choosing
experts and from each seed. The seed decides the first weights and the order of the data, which are
the same for all ways. No pair is dropped in training.

- **top-k, no balancing**: a token takes the k experts of the largest scores.
- **top-k, load-balance loss**: the same, and {LOAD_BALANCE_WEIGHT} times
  `ops.moe.load_balance_loss` is added to the loss.
- **loss-free bias**: a bias on each expert's score, for the choice only, moves by {BIAS_RATE} after
  each step towards balance (`ops.moe.update_expert_bias_`).
- **Sinkhorn**: in training a token takes the k experts for which the balanced plan of its batch is
  largest, or with *per sequence* that of its sequence. At inference the choice is plain *top-k*, or
  with a *learned bias*, the mean of what balancing added to the logits in training
  (`nn.SinkhornRouter`). Both are of one training.
- **expert choice**: a token goes to the experts whose moving threshold its score reaches, in
  training too (`nn.ExpertChoiceRouter` with `causal=True`), k experts on average.

The columns:

- **bits per byte**: on the files held out, each byte predicted once, with half a context or more
  before it.
- **largest load, training**: the pairs of the expert that has the most, over the mean of all
  experts; averaged over layers and the batches of the last {LAST_STEPS} steps.
- **largest load**, **dropped** and **experts a token**: on the files held out, as the model chooses
  at inference; in batches of the size of training's, their windows in random order. Dropped is the
  share of pairs without a place if an expert kept ceil(1.25 T k / E) of a batch of T tokens; the
  evaluation itself drops none.
- **step**: the median time of a training step, the ways taking turns, in the first steps of a
  training, when loads are still even.

Figures are means over the seeds, with the least and the most in brackets.

To repeat: `python -m bench.routers --help`.
"""


def spread(values: list[float], digits: int) -> str:
    """The mean, and the range where there is one."""
    mean, low, high = (
        f"{value:.{digits}f}" for value in (sum(values) / len(values), min(values), max(values))
    )
    return mean if low == high else f"{mean} ({low} to {high})"


def table(head: list[str], rows: Iterable[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *rows]]


def each(results: list[dict[str, Any]], key: str) -> str:
    """The values of the environments, where they differ one after another."""
    values = [str(result["environment"][key]) for result in results]
    return ", ".join(sorted(set(values)))


def without_steps(result: dict[str, Any]) -> dict[str, Any]:
    settings = result["settings"]
    return {**settings, "train": {**settings["train"], "steps": None}}


def described(settings: dict[str, Any]) -> list[str]:
    model, train, data = settings["model"], settings["train"], settings["data"]
    config = MoELMConfig(**model)
    per_step = train["batch_size"] * train["accumulation"] * model["context"]
    return [
        f"- model: {config.num_params() / 1e6:.1f} million parameters,"
        f" {config.active_params() / 1e6:.1f} million active in a token; {model['num_layers']}"
        f" layers, H={model['hidden_size']}, E={model['num_experts']} experts of"
        f" {model['expert_size']}, k={model['top_k']}",
        f"- training: {train['steps']:,} steps of {per_step:,} bytes, in sequences of"
        f" {model['context']}; learning rate {train['learning_rate']:g}",
        f"- data: {data['training bytes']:,} bytes to train on,"
        f" {data['held-out bytes']:,} held out",
        f"- Sinkhorn: {model['sinkhorn_iters']} iterations, temperature"
        f" {model['sinkhorn_temperature']:g}, weights from the {model['sinkhorn_weights']}",
    ]


def section(folder: Path) -> list[str]:
    """Raises ValueError where the folder's files do not belong together."""
    files = sorted(path for path in folder.glob("*.json") if path.name != TIMES)
    results = [json.loads(path.read_text(encoding="utf-8")) for path in files]
    for path, result in zip(files, results, strict=True):
        if result["settings"] != results[0]["settings"]:
            raise ValueError(
                f"{path.name} has other settings than {files[0].name}; measure one of them again"
            )
    times: dict[str, float] = {}
    every = list(results)
    if (folder / TIMES).exists():
        timed = json.loads((folder / TIMES).read_text(encoding="utf-8"))
        if without_steps(timed) != without_steps(results[0]):
            raise ValueError(f"{TIMES} has other settings than {files[0].name}; time again")
        times = timed["step ms"]
        every.append(timed)
    rows = []
    for name, way in WAYS.items():
        mine = [result for result in results if result["way"] == name]
        for row in way.rows if mine else ():
            found = [result["rows"][row] for result in mine]
            rows.append(
                [
                    row,
                    spread([f["bits per byte"] for f in found], 3),
                    spread([result["training"]["largest load"] for result in mine], 2),
                    spread([f["largest load"] for f in found], 2),
                    spread([100 * f["dropped"] for f in found], 1),
                    spread([f["experts a token"] for f in found], 2),
                    f"{times[name]:.1f}" if name in times else "",
                ]
            )
    seeds = sorted({result["seed"] for result in results})
    head = ["", "bits per byte", "largest load, training", "largest load", "dropped, %"]
    return [
        f"## {each(every, 'device')}",
        "",
        *(
            f"- {key}: {each(every, key)}"
            for key in ("date", "commit", "python", "torch", "threads")
        ),
        *described(results[0]["settings"]),
        f"- seeds: {', '.join(map(str, seeds))}",
        "",
        *table([*head, "experts a token", "step, ms"], rows),
        "",
    ]


def render(folders: Iterable[Path]) -> str:
    lines = HEAD.splitlines() + [""]
    measured = [folder for folder in sorted(folders) if any(folder.glob("*-*.json"))]
    for folder in measured:
        lines += section(folder)
    if not measured:
        lines += ["No results yet.", ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(RESULTS.glob("*")), encoding="utf-8")
