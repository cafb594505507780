"""The progress bars, and lines in their place where the output is no terminal."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from experiments.common.processes import is_first
from experiments.common.records import Row

_WIDTH_WITHOUT_TERMINAL = 110


def make_console() -> Console:
    """Returns a console that does not fold tables when its output is a file.

    Of several processes only the first one speaks.
    """
    quiet = not is_first()
    console = Console(quiet=quiet)
    if not console.is_terminal:
        console = Console(width=_WIDTH_WITHOUT_TERMINAL, quiet=quiet)
    return console


def table(
    console: Console, columns: Mapping[str, Callable[[Any], Any]], rows: Iterable[Any]
) -> None:
    """Prints a table; see `experiments.common.report.markdown`."""
    shown = Table(box=box.SIMPLE_HEAD, padding=0)
    for i, name in enumerate(columns):
        # The first column may be folded on a narrow screen, the numbers not.
        heading = name.replace(" ", "\n") if i else name
        shown.add_column(heading, justify="right" if i else "left", no_wrap=i > 0)
    for row in rows:
        cells = (make(row) for make in columns.values())
        shown.add_row(*("" if cell is None else str(cell) for cell in cells))
    console.print(shown)


class Display:
    """Shows the progress of the runs: loss, speed, memory, time left."""

    def __init__(self, console: Console):
        """Builds the display; nothing is shown before `with`."""
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:24}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=console,
            refresh_per_second=4,
            disable=console.quiet or not console.is_terminal,
        )

    def __enter__(self) -> "Display":
        """Starts to draw."""
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Leaves the bars as they are."""
        self._progress.stop()

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self.console.print(text, highlight=False, markup=False)

    def add(self, title: str, total: int, done: int) -> "Bar":
        """Adds the bar of one run."""
        task = self._progress.add_task(title, total=total, completed=done, status="")
        return Bar(self, self._progress, task, title, total)


class Bar:
    """The bar of one run."""

    def __init__(
        self, display: Display, progress: Progress, task: TaskID, title: str, total: int
    ):
        """Made by `Display.add`."""
        self._display = display
        self._progress = progress
        self._task = task
        self._title = title
        self._total = total

    def say(self, text: str) -> None:
        """Says what the run is about to do."""
        self._progress.update(self._task, status=text)
        if not self._display.console.is_terminal:
            self._display.say(f"{self._title:24} {text}")

    def show(self, row: Row) -> None:
        """Shows one row of the metrics; without a terminal, those with a validation."""
        parts = []
        if "loss" in row:
            parts += [f"loss {row['loss']:.3f}"]
        if "validation_loss" in row:
            parts += [f"validation {row['validation_loss']:.3f}"]
        if "loss" in row:
            parts += [
                f"{row['tokens_per_second']:,.0f} tokens/s",
                f"step {row['step_bytes'] / 2**30:.2f} GiB",
            ]
        status = "  ".join(parts)
        self._progress.update(self._task, completed=row["update"], status=status)
        if "validation_loss" in row and not self._display.console.is_terminal:
            update = f"{row['update']:>4}/{self._total}"
            self._display.say(f"{self._title:24} {update}  {status}")
