"""A picture of a run: its loss, and how evenly its experts were used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Records = Sequence[Mapping[str, Any]]


def plot_runs(path: str | Path, runs: Mapping[str, Records], xz: float | None = None) -> Path:
    """Writes a PNG of loss curves, and of expert load where a run has experts.

    runs  name -> records of a Trainer, drawn in order
    xz    bits per byte of xz -9 on the held-out bytes, drawn as a line
    """
    routed = [name for name, records in runs.items() if any("load" in r for r in records)]
    figure = Figure(figsize=(8, 4 + 3 * len(routed)), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, *load_axes = np.atleast_1d(figure.subplots(1 + len(routed), 1))
    _plot_loss(loss_axes, runs, xz)
    for axes, name in zip(load_axes, routed, strict=True):
        image = _plot_load(axes, runs[name])
        axes.set_title(f"{name}: expert load")
        figure.colorbar(image, ax=axes, label="load / mean")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _plot_loss(axes: Any, runs: Mapping[str, Records], xz: float | None) -> None:
    top = 0.0
    for index, (name, records) in enumerate(runs.items()):
        color = f"C{index}"
        training = [(r["bytes"] / 1e6, r["bits_per_byte"]) for r in records if "bytes" in r]
        per_step = max((r["bytes"] / r["step"] / 1e6 for r in records if "bytes" in r), default=0)
        held_out = [
            (r["step"] * per_step, r["validation_bits_per_byte"])
            for r in records
            if "validation_bits_per_byte" in r
        ]
        axes.plot(*zip(*training, strict=True), color=color, alpha=0.5, label=f"{name}, training")
        if held_out:
            axes.plot(
                *zip(*held_out, strict=True), color=color, marker="o", label=f"{name}, held-out"
            )
        top = max(top, float(np.quantile([y for _, y in training], 0.95)))
    if xz is not None:
        axes.axhline(xz, color="black", linestyle="--", label="xz -9, held-out")
    axes.set_xlabel("million bytes trained on")
    axes.set_ylabel("bits per byte")
    axes.set_ylim(0, top * 1.1)
    axes.grid(alpha=0.3)
    axes.legend()


def _plot_load(axes: Any, records: Records) -> Any:
    """Each row is an expert of a layer; its colour is its share in units of an even share."""
    records = [r for r in records if "load" in r]
    load = np.array([r["load"] for r in records])  # [intervals, layers, experts]
    intervals, layers, experts = load.shape
    edges = np.array([0, *(r["bytes"] / 1e6 for r in records)])
    rows = np.arange(layers * experts + 1)
    image = axes.pcolormesh(
        edges, rows, load.reshape(intervals, -1).T * experts, vmin=0, vmax=2, cmap="RdBu_r"
    )
    for layer in range(1, layers):
        axes.axhline(layer * experts, color="black", linewidth=0.5)
    axes.set_yticks((np.arange(layers) + 0.5) * experts, [f"layer {i}" for i in range(layers)])
    axes.invert_yaxis()
    axes.set_xlabel("million bytes trained on")
    return image
