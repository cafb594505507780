"""What the trainings of the family found: loss beside the bytes of state."""

import math
import pathlib
import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from experiments.family.recipes import FAMILY
from experiments.finetune.methods import METHODS
from experiments.sweep.report import PALETTE, Cell

_MARKS = "osD^v<>Phd*pX"
_WORDS = {
    "orthogonal True": "",  # The default.
    "orthogonal False": "not orthogonalised",
    "state_dtype int8": "int8",
    "nesterov False": "without look-ahead",
    "lora_tune_rest False": "adapters alone",
}
"""Of options, where their own would be long."""


def table(cells: Sequence[Cell]) -> str:
    """Returns the cells as a Markdown table, the lowest loss first.

    "Over AdamW" is the mean, with its standard error, of the differences at the same
    seed, which shares initial parameters and the order of the data.
    """
    reference = _reference(cells)
    lines = [
        "| optimizer | rank | b2 | learning rate | validation loss | over AdamW |"
        " state of matrices, MB | of AdamW's | whole state, MB | ms/update |",
        f"| --- |{' ---: |' * 9}",
    ]
    for cell in sorted(cells, key=lambda cell: cell.mean):
        share = ""
        if reference is not None:
            share = f"{cell.matrix_bytes / reference.matrix_bytes:.3f}"
        lines.append(
            f"| {title(cell)} | {cell.rank or ''} | {cell.b2 or ''} "
            f"| {cell.learning_rate:g} | {cell.written()} "
            f"| {_difference(cell, reference)} | {cell.matrix_bytes / 1e6:.2f} "
            f"| {share} | {cell.state_bytes / 1e6:.2f} "
            f"| {1000 * cell.step_seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def title(cell: Cell) -> str:
    """Returns the name of a cell's optimizer or method, with what was set."""
    titles = FAMILY if cell.method in FAMILY else METHODS
    words = [_WORDS.get(option, option) for option in cell.options.split(", ")]
    return ", ".join(filter(None, [titles[cell.method].title, *words]))


def _reference(cells: Sequence[Cell]) -> Cell | None:
    """The better of the AdamWs."""
    found = [cell for cell in cells if cell.method == "adamw" and not cell.options]
    return min(found, key=lambda cell: cell.mean, default=None)


def _difference(cell: Cell, reference: Cell | None) -> str:
    if reference is None or not math.isfinite(cell.mean):
        return ""
    other = {row["seed"]: row["validation_loss"] for row in reference.rows}
    pairs = [
        row["validation_loss"] - other[row["seed"]]
        for row in cell.rows
        if other.get(row["seed"]) is not None
    ]
    if len(pairs) < 2:
        return f"{pairs[0]:+.3f}" if pairs else ""
    error = statistics.stdev(pairs) / math.sqrt(len(pairs))
    return f"{statistics.fmean(pairs):+.3f} ± {error:.3f}"


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Draws loss over the bytes of the matrices' state; dots join the ranks.

    The step line is the Pareto front: the lowest loss at so many bytes or fewer.
    """
    cells = [cell for cell in cells if math.isfinite(cell.mean)]
    groups: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((title(cell), cell.b2), []).append(cell)
    names = [name for name, _ in groups]
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    axes = figure.subplots()
    for place, ((name, decay), mine) in enumerate(groups.items()):
        mine.sort(key=lambda cell: cell.matrix_bytes)
        suffix = f", b2 {decay}" if names.count(name) > 1 else ""
        axes.errorbar(
            [cell.matrix_bytes / 1e6 for cell in mine],
            [cell.mean for cell in mine],
            [cell.error for cell in mine],
            color=PALETTE[place % len(PALETTE)],
            marker=_MARKS[place % len(_MARKS)],
            linestyle=":",
            capsize=3,
            label=name + suffix,
        )
    front = _front(cells)
    if front:
        most = max(cell.matrix_bytes for cell in cells) / 1e6
        axes.step(
            [cell.matrix_bytes / 1e6 for cell in front] + [most],
            [cell.mean for cell in front] + [front[-1].mean],
            where="post",
            color="black",
            alpha=0.35,
            linewidth=1,
            label="Pareto front",
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("optimizer state of the matrices, MB (logarithmic)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Mean and standard error over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    if groups:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)


def _front(cells: Sequence[Cell]) -> list[Cell]:
    """The cells below which nothing with as few bytes lies, by their bytes."""
    front: list[Cell] = []
    for cell in sorted(cells, key=lambda cell: (cell.matrix_bytes, cell.mean)):
        if not front or cell.mean < front[-1].mean:
            front.append(cell)
    return front
