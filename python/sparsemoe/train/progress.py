"""What a person sees while a model trains."""

from __future__ import annotations

import sys
import time
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """Takes records and shows nothing; a context manager around training."""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, record: dict[str, Any]) -> None:
        """Takes one record of ``Trainer.records``."""


class LineProgress(Progress):
    """One line a record, at most one in ``every`` seconds: for logs and pipes."""

    def __init__(self, every: float = 5.0, stream: TextIO | None = None) -> None:
        self.every, self.stream = every, stream or sys.stdout
        self.last = -float("inf")
        self.validation = ""

    def update(self, record: dict[str, Any]) -> None:
        if "validation_bits_per_byte" in record:
            self.validation = f"  validation {record['validation_bits_per_byte']:.3f}"
            if "validation_byte_accuracy" in record:
                self.validation += f" ({record['validation_byte_accuracy']:.2%} right)"
            return
        now = time.monotonic()
        at_end = record["step"] == record["total_steps"]
        if now - self.last < self.every and not at_end:
            return
        self.last = now
        total = record["total_steps"] or "?"
        line = f"step {record['step']}/{total}  bits/byte {record['bits_per_byte']:.3f}"
        line += f"{self.validation}  {record['bytes_per_second']:,.0f} bytes/s"
        if "load" in record:
            line += f"  busiest expert {busiest(record['load']):.2f}x the mean"
        if "byte_accuracy" in record:
            line += f"  {record['byte_accuracy']:.2%} right"
        if "perplexity" in record:
            line += f"  codes {record['code_bits']:.2f} bits/byte"
            line += f"  perplexity {' '.join(f'{p:.0f}' for p in record['perplexity'])}"
        print(line, file=self.stream, flush=True)


class LiveProgress(Progress):
    """A panel that is redrawn in place, for a terminal."""

    def __init__(self, console: Console | None = None) -> None:
        self.record: dict[str, Any] = {}
        self.validation: float | None = None
        self.accuracy: float | None = None
        self.live = Live(console=console, refresh_per_second=4)

    def __enter__(self) -> LiveProgress:
        self.live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.live.stop()

    def update(self, record: dict[str, Any]) -> None:
        if "validation_bits_per_byte" in record:
            self.validation = record["validation_bits_per_byte"]
            self.accuracy = record.get("validation_byte_accuracy")
        else:
            self.record = record
        self.live.update(self._render())

    def _render(self) -> Group | Text:
        record = self.record
        if not record:
            return Text("starting")
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        total = record["total_steps"]
        table.add_row("step", f"{record['step']:,} of {f'{total:,}' if total else '?'}")
        table.add_row("loss", f"{record['bits_per_byte']:.3f} bits per byte")
        if self.validation is not None:
            table.add_row("validation", f"{self.validation:.3f} bits per byte")
        if "byte_accuracy" in record:
            validated = f", validation {self.accuracy:.2%}" if self.accuracy is not None else ""
            table.add_row("right bytes", f"{record['byte_accuracy']:.2%}{validated}")
        if "code_bits" in record:
            table.add_row("codes", f"{record['code_bits']:.3f} bits per byte")
        stages = zip(record.get("perplexity", ()), record.get("code_usage", ()), strict=True)
        for stage, (perplexity, used) in enumerate(stages, 1):
            name = "perplexity" if stage == 1 else ""
            table.add_row(name, f"stage {stage}: {perplexity:,.0f}, {used:.0%} of the codes used")
        table.add_row("speed", f"{record['bytes_per_second']:,.0f} bytes (tokens) per second")
        for layer, load in enumerate(record.get("load", ())):
            name = "expert load" if layer == 0 else ""
            mean = f"{max(load) * len(load):.2f}x the mean at most"
            table.add_row(name, f"{load_bars(load)}  {mean}")
        bar = ProgressBar(total=total or 1, completed=record["step"] if total else 0, width=60)
        return Group(bar, table)


def load_bars(load: list[float]) -> str:
    """One bar an expert: half height is an even share."""
    even = 1 / len(load)
    return "".join(BARS[min(7, int(share / even * 4))] for share in load)


def busiest(load: list[list[float]]) -> float:
    """The largest share of any expert in any layer, in units of an even share."""
    return max(max(layer) * len(layer) for layer in load)


def make_progress(stream: TextIO | None = None) -> Progress:
    """A live panel on a terminal, lines elsewhere."""
    stream = stream or sys.stdout
    if stream.isatty():
        return LiveProgress(Console(file=stream))
    return LineProgress(stream=stream)
