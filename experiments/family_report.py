"""What the trainings of the family found: loss beside the bytes of state."""

import math
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.family import FAMILY
from experiments.sweep_report import Cell

_MARKS = "osD^v<>Phd*pX"
# From the palette of Okabe and Ito.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")


def table(cells: Sequence[Cell]) -> str:
    """Returns the cells as a Markdown table, the lowest loss first."""
    lines = [
        "| optimizer | rank | b2 | learning rate | validation loss | state, MB |"
        " of which matrices, MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for cell in sorted(cells, key=lambda cell: cell.mean):
        lines.append(
            f"| {FAMILY[cell.method].title} | {cell.rank or ''} | {cell.b2 or ''} "
            f"| {cell.learning_rate:g} | {cell.mean:.3f} ± {cell.error:.3f} "
            f"| {cell.state_bytes / 1e6:.2f} | {cell.matrix_bytes / 1e6:.2f} |"
        )
    return "\n".join(lines) + "\n"


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Draws loss over the bytes that the matrices' state takes; a line joins ranks."""
    groups: dict[tuple[str, float | None], list[Cell]] = {}
    for cell in cells:
        if math.isfinite(cell.mean):
            groups.setdefault((cell.method, cell.b2), []).append(cell)
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    axes = figure.subplots()
    for place, ((method, decay), mine) in enumerate(groups.items()):
        mine.sort(key=lambda cell: cell.matrix_bytes)
        suffix = "" if decay is None else f", b2 {decay}"
        axes.errorbar(
            [cell.matrix_bytes / 1e6 for cell in mine],
            [cell.mean for cell in mine],
            [cell.error for cell in mine],
            color=_COLOURS[place % len(_COLOURS)],
            marker=_MARKS[place % len(_MARKS)],
            linestyle=":",
            capsize=3,
            label=FAMILY[method].title + suffix,
        )
    axes.set_xscale("log")
    axes.set_xlabel("state of the matrices, MB (logarithmic)")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Mean and standard error over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    if groups:
        figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    figure.savefig(path, dpi=150)
