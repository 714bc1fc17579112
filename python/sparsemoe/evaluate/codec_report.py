"""An evaluation of a codec as text and as a picture, beside general compressors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sparsemoe.data import Corpus
from sparsemoe.evaluate.bits import xz_bits_per_byte, zstd_bits_per_byte
from sparsemoe.evaluate.codec import CodecEvaluation

Records = Sequence[Mapping[str, Any]]
Compressors = Mapping[str, float | None]


def compressors(corpus: Corpus) -> dict[str, float | None]:
    """Bits per byte of xz -9 and of zstd -19 (None where it is not installed) on all of it."""
    return {
        "xz_bits_per_byte": xz_bits_per_byte(corpus),
        "zstd_bits_per_byte": zstd_bits_per_byte(corpus),
    }


def format_evaluation(result: CodecEvaluation, others: Compressors) -> str:
    """Two tables, and what is to be known to read them."""
    ratio, all_stages = result.compression_ratio, len(result.entropy)
    lines = [
        f"{result.bytes:,} bytes in {result.windows:,} windows of {result.context:,}, each by "
        f"itself; {ratio} bytes a patch, {all_stages} codes a patch"
        + (f", the best of {result.tries} tries where bytes came back wrong" * (result.tries > 0)),
        "",
        "decoded from                  " + "".join(f"{_name(s.stages):>12}" for s in result.stages),
    ]
    rows = (
        ("bytes right", "byte_accuracy", ".3%"),
        ("patches without an error", "exact_patches", ".2%"),
        ("windows without an error", "exact_windows", ".2%"),
        ("bits per byte: codes", "code_bits", ".3f"),
        ("  + reconstruction", "reconstruction_bits", ".3f"),
        ("  = total without loss", "total_bits", ".3f"),
    )
    for label, field, form in rows:
        values = "".join(f"{getattr(s, field):>12{form}}" for s in result.stages)
        lines.append(f"{label:30}{values}")
    lines += ["", "stage                         " + _row(range(1, all_stages + 1), "")]
    lines.append("entropy, bits a code          " + _row(result.entropy, ".2f"))
    lines.append("perplexity                    " + _row(result.perplexity, ",.1f"))
    lines.append("codes used                    " + _row(result.usage, ".1%"))
    lines += ["", "bits per byte of the same files as one"]
    for name, key in (("xz -9", "xz_bits_per_byte"), ("zstd -19", "zstd_bits_per_byte")):
        value = others.get(key)
        lines.append(f"{'  ' + name:30}" + ("not installed" if value is None else f"{value:12.3f}"))
    lines += [
        "",
        "The reconstruction's bits are given the codes of the same bytes, so they are no language",
        "model's score. Comparable is the total alone, which leaves out the codec itself and a",
        "table of the codes' frequencies.",
    ]
    return "\n".join(lines)


def _name(stages: int) -> str:
    return f"{stages} stage" + ("s" if stages > 1 else "")


def _row(values: Sequence[float] | range, form: str) -> str:
    return "".join(f"{value:>12{form}}" for value in values)


def plot_codec(
    path: str | Path,
    result: CodecEvaluation,
    records: Records,
    others: Compressors,
    searched: Sequence[CodecEvaluation] = (),
) -> Path:
    """Writes a PNG: rate against distortion over the stages, and errors over training time.
    ``searched``: more evaluations, of codes that were tried."""
    figure = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    (errors, bits), (training, usage) = figure.subplots(2, 2)
    rate = [s.code_bits for s in result.stages]
    for each in (result, *searched):
        wrong = [max(1 - s.byte_accuracy, 1e-6) for s in each.stages]
        label = f"best of {each.tries} tries" if each.tries else "nearest codes"
        errors.semilogy([s.code_bits for s in each.stages], wrong, marker="o", label=label)
    errors.legend()
    errors.set_ylabel("share of bytes wrong")
    errors.set_title("rate and distortion, 1 stage to all")
    bits.plot(rate, [s.reconstruction_bits for s in result.stages], marker="o", label="given codes")
    bits.plot(rate, [s.total_bits for s in result.stages], marker="o", label="total without loss")
    for name, key, style in (("xz -9", "xz_bits_per_byte", "--"), ("zstd -19", "", ":")):
        value = others.get(key or "zstd_bits_per_byte")
        if value is not None:
            bits.axhline(value, color="black", linestyle=style, label=name)
    bits.set_ylabel("bits per byte")
    bits.set_ylim(bottom=0)
    bits.legend()
    for axes in (errors, bits):
        axes.set_xlabel("codes, bits per byte")
    _plot_training(training, usage, records)
    for axes in (errors, bits, training, usage):
        axes.grid(alpha=0.3)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path


def _plot_training(errors: Any, usage: Any, records: Records) -> None:
    training = [r for r in records if "byte_accuracy" in r]
    held_out = [r for r in records if "validation_byte_accuracy" in r]
    for of, key, style in (
        (training, "byte_accuracy", {"label": "training"}),
        (held_out, "validation_byte_accuracy", {"label": "held-out", "marker": "o"}),
    ):
        wrong = [{**r, "wrong": max(1 - r[key], 1e-6)} for r in of]
        _plot_over_time(errors, wrong, "wrong", **style)
    errors.set_yscale("log")
    errors.set_ylabel("share of bytes wrong")
    errors.legend()
    quantized = [r for r in training if "perplexity" in r]
    for stage in range(len(quantized[0]["perplexity"]) if quantized else 0):
        values = [{**r, "perplexity": r["perplexity"][stage]} for r in quantized]
        _plot_over_time(usage, values, "perplexity", label=f"stage {stage + 1}")
    usage.set_ylabel("perplexity of the codes, training")
    if quantized:
        usage.legend()
    for axes in (errors, usage):
        axes.set_xlabel("minutes of training")


def _plot_over_time(axes: Any, records: Records, key: str, **style: Any) -> None:
    axes.plot([r["seconds"] / 60 for r in records], [r[key] for r in records], **style)
