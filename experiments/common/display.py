"""The progress bars, and lines in their place where the output is no terminal."""

import functools
from collections.abc import Iterable
from typing import Any

from rich import box, progress
from rich.console import Console
from rich.table import Table

from experiments.common import report
from experiments.common.processes import is_first
from experiments.common.records import Row


def make_console() -> Console:
    """Returns a console that does not fold tables when its output is a file.

    Of several processes only the first one speaks.
    """
    width = None if Console().is_terminal else 110
    return Console(width=width, quiet=not is_first(), highlight=False)


def table(console: Console, columns: report.Columns, rows: Iterable[Any]) -> None:
    """Prints a table; see `experiments.common.report.markdown`."""
    shown = Table(box=box.SIMPLE_HEAD, padding=0)
    for i, name in enumerate(columns):
        # The first column may be folded on a narrow screen, the numbers not.
        heading = name.replace(" ", "\n") if i else name
        shown.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for cells in report.cells(columns, rows):
        shown.add_row(*cells)
    console.print(shown)


def bars(console: Console) -> progress.Progress:
    """Returns what draws the bars of all runs during a `with`."""
    return progress.Progress(
        progress.TextColumn("{task.description:24}"),
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[status]}"),
        progress.TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
        disable=console.quiet or not console.is_terminal,
    )


class Bar:
    """The bar of one run: loss, speed, memory, time left."""

    def __init__(self, bars: progress.Progress, title: str, total: int, done: int):
        """Adds it to `bars`, with `done` of the `total` updates."""
        self._title, self._total = title, total
        task = bars.add_task(title, total=total, completed=done, status="")
        self._update = functools.partial(bars.update, task)
        self._console = bars.console

    def _print(self, text: str) -> None:
        """Prints a line where there is no terminal to draw bars on."""
        if not self._console.is_terminal:
            line = f"{self._title:24} {text}"
            self._console.print(line, highlight=False, markup=False)

    def say(self, text: str) -> None:
        """Says what the run is about to do."""
        self._update(status=text)
        self._print(text)

    def show(self, row: Row) -> None:
        """Shows one row of the metrics; without a terminal, those with a validation."""
        parts = []
        if "loss" in row:
            speed = f"{row['tokens_per_second']:,.0f} tokens/s"
            memory = f"step {row['step_bytes'] / 2**30:.2f} GiB"
            parts = [f"loss {row['loss']:.3f}", speed, memory]
        if "validation_loss" in row:
            parts.insert(1, f"validation {row['validation_loss']:.3f}")
        status = "  ".join(parts)
        self._update(completed=row["update"], status=status)
        if "validation_loss" in row:
            self._print(f"{row['update']:>4}/{self._total}  {status}")
