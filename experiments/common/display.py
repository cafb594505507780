"""The progress bars, and lines in their place where the output is no terminal."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

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


class Display:
    """Shows how the trainings get on: loss, speed, memory, time left."""

    def __init__(self, console: Console):
        """Builds the display; nothing is shown before `with`."""
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:20}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[speed]} tokens/s"),
            TextColumn("{task.fields[memory]} GiB"),
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
        """Adds the bar of one training."""
        task = self._progress.add_task(
            title,
            total=total,
            completed=done,
            loss="  -  ",
            speed="    -",
            memory="  -",
        )
        return Bar(self, self._progress, task, title, total)


class Bar:
    """The bar of one training."""

    def __init__(
        self, display: Display, progress: Progress, task: TaskID, title: str, total: int
    ):
        """Made by `Display.add`."""
        self._display = display
        self._progress = progress
        self._task = task
        self._title = title
        self._total = total

    def show(self, row: Row) -> None:
        """Shows one row of the metrics."""
        self._progress.update(
            self._task,
            completed=row["update"],
            loss=f"{row['loss']:.3f}",
            speed=f"{row['tokens_per_second']:6,.0f}",
            memory=f"{row['step_bytes'] / 2**30:.2f}",
        )
        if "validation_loss" in row and not self._display.console.is_terminal:
            self._display.say(
                f"{self._title:20} {row['update']:>4}/{self._total}  "
                f"loss {row['loss']:.3f}  validation {row['validation_loss']:.3f}  "
                f"{row['tokens_per_second']:,.0f} tokens/s  "
                f"step {row['step_bytes'] / 2**30:.2f} GiB"
            )
