"""What trainings on the paper's claims found: metrics beside memory, by method."""

import math
import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.family import report as family_report
from experiments.sweep.report import PALETTE, Cell

_METRICS = {
    "validation_loss": "validation loss (nats per token)",
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "exact_match": "exact match (%)",
}
_KINDS = ("flora", "lora")
"""In the names of methods; those of the uncompressed ones have neither."""


def title(cell: Cell) -> str:
    """Returns the name of a cell's method, with rank and what was set."""
    name = family_report.title(cell)
    return name if cell.rank is None else f"{name}, r={cell.rank}"


def _metrics(cells: Sequence[Cell]) -> list[str]:
    return [name for name in _METRICS if all(name in c.rows[0] for c in cells)]


def table(cells: Sequence[Cell]) -> str:
    """Returns the cells as a Markdown table, the lowest loss first."""
    names = _metrics(cells)
    heads = [_METRICS[name].split(" (")[0] for name in names]
    columns = [
        "method",
        "learning rate",
        *heads,
        "trained, MB",
        "state, MB",
        "step, MB",
    ]
    lines = [_line(columns), _line(["---"] + ["---:"] * (len(columns) - 1))]
    for cell in sorted(cells, key=lambda cell: cell.mean):
        sizes = [cell.rows[0][f"{name}_bytes"] for name in ("trained", "state", "step")]
        digits = [3 if name == "validation_loss" else 1 for name in names]
        scores = map(cell.written, names, digits)
        lines.append(
            _line(
                [
                    title(cell),
                    f"{cell.learning_rate:g}",
                    *scores,
                    *(f"{size / 1e6:.2f}" for size in sizes),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Draws a panel per metric, with a row per method; bars are standard errors."""
    cells = [cell for cell in cells if math.isfinite(cell.mean)]
    cells.sort(key=lambda cell: cell.mean)
    if not cells:
        return  # The table says so.
    names = _metrics(cells)
    titles = [title(cell) for cell in cells]
    longest = 0.085 * max(map(len, titles))  # Inches.
    size = longest + 3.2 * len(names), 1.2 + 0.28 * len(cells)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        _dots(axes, cells, name)
        axes.set_xlabel(_METRICS[name])
    panels[0].set_yticks(range(len(cells)), titles)
    panels[0].invert_yaxis()
    figure.suptitle("Mean and standard error over seeds", fontsize=10)
    figure.savefig(path, dpi=150)


def _dots(axes: Axes, cells: Sequence[Cell], name: str) -> None:
    for place, cell in enumerate(cells):
        mean, error = cell.statistics(name)
        kinds = [kind in cell.method for kind in _KINDS]
        look = kinds.index(True) if any(kinds) else len(_KINDS)
        axes.errorbar(
            [mean],
            [place],
            xerr=[error],
            color=PALETTE[look],
            marker="osD"[look],
            linestyle="none",
            capsize=3,
        )
    axes.grid(alpha=0.3)
