"""Writes docs/benchmarks.md from bench/results/*.json: python tools/make_benchmark_docs.py"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"

HEAD = """# Benchmarks

Made by `tools/make_benchmark_docs.py` from the files in `bench/results`; do not edit.

On a GPU a time is device time: the median over repeated calls, the L2 cache flushed before each,
the call enqueued while the GPU waits, so that launches are not counted. The cache is flushed by
reading other data; where the environment does not say so, by writing it, so that a call that reads
much also waits until it is written back, up to 10 us. On a CPU a time is the median wall time, and
caches are warm. The implementations of an operation take turns, so that a GPU's heat and whatever
else a CPU does fall on all. Every result was first compared with the reference. The
floor is the larger of the bytes that the operation must move over the copy bandwidth of the same
run (on a CPU, that of a copy of the same size), and its operations over the rate of a large dense
matrix product of the same dtype (for rvq on a GPU: of bfloat16) in the same run, of which a
percentage is given; what is counted stands at the end. "Plain PyTorch" is the fastest of the
expressions in `bench/plain_*.py`, eager or compiled.

To repeat: `python -m bench.run --out FILE`. To explain a time: `python -m bench.profile --help`.
"""

# operations of which memory and launches are listed
WHOLE = ("layer", "encode", "beam_encode", "training step")
OTHER_CODES = "other codes, %"


def kind(implementation: str) -> str:
    if implementation in ("sparsemoe", "reference"):
        return implementation
    return "torch" if implementation.startswith("torch") else "peer"


def best(rows: list[dict[str, Any]], of: str) -> dict[str, Any] | None:
    """The fastest of a kind, or None."""
    measured = [row for row in rows if kind(row["implementation"]) == of and "ms" in row]
    return min(measured, key=lambda row: row["ms"], default=None)


def cases(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The rows of each (shape, op), in the order of their first appearance."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault((row["shape"], row["op"]), []).append(row)
    return found


def figure(value: float | None) -> str:
    """Three digits."""
    return "" if value is None else f"{float(f'{value:.3g}'):,g}"


def rate(row: dict[str, Any]) -> str:
    """Operations, with the percentage of a dense product's, or bytes where they set the floor."""
    share = row.get("% of matmul")
    if "TFLOP/s" in row and not (share and share * row["ratio to floor"] < 99):
        value, units = row["TFLOP/s"] * 1000, ("GFLOP/s", "TFLOP/s")
    else:
        value, units, share = row["GB/s"], ("GB/s", "TB/s"), None
    text = f"{figure(value)} {units[0]}" if value < 1000 else f"{figure(value / 1000)} {units[1]}"
    return f"{text}, {share:.0f} %" if share else text


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in [head, rule, *rows]]


def short(implementation: str) -> str:
    return implementation.removeprefix("torch, ").removeprefix("torch-")


def comparison(rows: list[dict[str, Any]]) -> list[str]:
    """For a terminal: a line for each case with the times of all, then what failed."""
    lines, failed, last = [], [], None
    for (shape, op), group in cases(rows).items():
        if shape != last:
            lines += [f"{shape}:", f"  {'':<38} {'ms':>8} {'x floor':>7}"]
            last = shape
        ours = best(group, "sparsemoe")
        line = f"  {op:<38} "
        line += f"{ours['ms']:8.4g} {ours['ratio to floor']:7.3g} {rate(ours):<18}" if ours else ""
        others = [row for row in group if row["implementation"] != "sparsemoe" and "ms" in row]
        line += ", ".join(f"{short(row['implementation'])} {figure(row['ms'])}" for row in others)
        rivals = [row["ms"] for row in others if row["implementation"] != "reference"]
        if ours and rivals:
            line += f"; {min(rivals) / ours['ms']:.2f} times faster"
        lines.append(line)
        failed += [row for row in group if "failed" in row]
    for row in failed:
        name = f"{row['op']}, {row['shape']}, {row['implementation']}"
        lines.append(f"failed: {name}: {row['failed']}")
    return lines


def versus(ours: dict[str, Any], theirs: dict[str, Any] | None) -> list[str]:
    if theirs is None:
        return ["", ""]
    name = short(theirs["implementation"])
    return [f"{figure(theirs['ms'])} ({name})", figure(theirs["ms"] / ours["ms"])]


def launches_show(row: dict[str, Any]) -> bool:
    return "extra MiB" in row and row.get("call ms", 0) > 1.5 * row["ms"]  # a GPU's


def listed(
    cases: dict[str, list[dict[str, Any]]], key: str, chosen: Callable[[dict[str, Any]], bool]
) -> str:
    found = {
        op: [f"{row['implementation']} {figure(row[key])}" for row in rows if chosen(row)]
        for op, rows in cases.items()
    }
    return "; ".join(f"{op}: {', '.join(texts)}" for op, texts in found.items() if texts)


def section(data: dict[str, Any]) -> list[str]:
    environment = data["environment"]
    lines = [f"## {environment['device']}: {', '.join(data['families'])}", ""]
    lines += [
        f"- {key}: {value}" for key, value in environment.items() if value and key != "device"
    ]
    groups = cases(data["results"])
    for shape, text in data["shapes"].items():
        mine = {op: rows for (name, op), rows in groups.items() if name == shape}
        lines += ["", f"### {shape}", "", text, ""]
        summary = []
        for op, rows in mine.items():
            ours = best(rows, "sparsemoe")
            if ours:
                summary.append(
                    [op, figure(ours["ms"]), rate(ours), figure(ours["floor ms"])]
                    + [figure(ours["ratio to floor"])]
                    + versus(ours, best(rows, "torch"))
                    + versus(ours, best(rows, "peer"))
                )
        lines += table(
            ["sparsemoe", "ms", "rate", "floor, ms", "ratio to floor"]
            + ["plain PyTorch, ms", "times faster", "best peer, ms", "times faster"],
            summary,
        )
        names = list(dict.fromkeys(row["implementation"] for rows in mine.values() for row in rows))
        names.sort(key=lambda name: ["sparsemoe", "reference", "torch", "peer"].index(kind(name)))
        times = []
        for op, rows in mine.items():
            by_name = {row["implementation"]: row for row in rows}
            cells = [by_name.get(name, {}) for name in names]
            times.append([op] + ["failed" if "failed" in c else figure(c.get("ms")) for c in cells])
        lines += ["", "All times, ms:", "", *table(["", *names], times)]
        whole = {op: rows for op, rows in mine.items() if op.startswith(WHOLE)}
        memory = listed(whole, "extra MiB", lambda row: bool(row.get("extra MiB")))
        if memory:
            lines += ["", f"Peak memory above the inputs, MiB: {memory}."]
        other = listed(mine, OTHER_CODES, lambda row: OTHER_CODES in row)
        if other:
            lines += ["", f"Codes that are not the reference's, %: {other}."]
        waiting = listed(whole, "call ms", launches_show)
        if waiting:
            lines += ["", f"Wall time of a call where launching it takes longer, ms: {waiting}."]
        failed = [
            f"- {op}, {row['implementation']}: {row['failed']}"
            for op, rows in mine.items()
            for row in rows
            if "failed" in row
        ]
        if failed:
            lines += ["", "Failed:", "", *failed]
    return [*lines, ""]


def render(files: list[Path]) -> str:
    lines = HEAD.splitlines() + [""]
    counts: dict[str, str] = {}
    for path in sorted(files):
        data = json.loads(path.read_text())
        lines += section(data)
        counts |= data["counts"]
    if not files:
        lines += ["No results yet.", ""]
    if counts:
        lines += ["## What the floors count", ""]
        lines += [f"- {op}: {text}" for op, text in counts.items()]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(render(list((ROOT / "bench" / "results").glob("*.json"))))


if __name__ == "__main__":
    main()
