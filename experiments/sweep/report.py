"""What a grid of short trainings found: its table and its picture."""

import dataclasses
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.records import Row
from experiments.main_job.methods import METHODS

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
"""Of Okabe and Ito, told apart by the colour-blind too; marks differ in shape."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One combination of what a grid varies, at its best learning rate."""

    method: str
    projection: str | None
    rank: int | None
    b2: float | None
    options: str
    """What else was set, as "name value, ..."."""
    learning_rate: float
    rows: tuple[Row, ...]
    """The runs of the seeds at that rate."""
    step_seconds: float
    """Median over the runs of the median wall time of an update."""

    @property
    def mean(self) -> float:
        """Mean validation loss, in nats per token; infinite if a seed diverged."""
        return self.statistics("validation_loss")[0]

    @property
    def error(self) -> float:
        """Standard error of the mean; zero for a single seed."""
        return self.statistics("validation_loss")[1]

    @property
    def state_bytes(self) -> int:
        """Of the whole optimizer state."""
        return self.rows[0]["state_bytes"]

    @property
    def matrix_bytes(self) -> int:
        """Of its part that compression is about."""
        return self.rows[0]["matrix_bytes"]

    def statistics(self, metric: str) -> tuple[float, float]:
        """Returns mean and standard error of a metric over the seeds."""
        values = [row[metric] for row in self.rows]
        if None in values:
            return math.inf, 0.0
        error = 0.0
        if len(values) > 1:
            error = statistics.stdev(values) / math.sqrt(len(values))
        return statistics.fmean(values), error

    def written(self, metric: str = "validation_loss", digits: int = 3) -> str:
        """Returns "mean ± error", without the error of a single seed, or "diverged"."""
        mean, error = self.statistics(metric)
        if not math.isfinite(mean):
            return "diverged"
        spread = f" ± {error:.{digits}f}" if len(self.rows) > 1 else ""
        return f"{mean:.{digits}f}{spread}"


def best_rate(rows: Sequence[Row]) -> float:
    """Returns the learning rate of the lowest loss, the lowest of all if none ended."""
    finished = [row for row in rows if row["validation_loss"] is not None]
    if not finished:
        return min(row["learning_rate"] for row in rows)
    return min(finished, key=lambda row: row["validation_loss"])["learning_rate"]


def beyond(rates: Sequence[float], best: float) -> float | None:
    """Returns the next rate outwards if the best one is the first or the last."""
    rates = sorted(rates)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    inner = rates[1] if best == rates[0] else rates[-2]
    return float(f"{best * best / inner:.3g}")


def summarise(rows: Sequence[Row]) -> list[Cell]:
    """Returns each cell at its best rate."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row.get(name) for name in ("method", "projection", "rank", "b2"))
        options = row.get("options", {})
        key += (", ".join(f"{name} {value}" for name, value in options.items()),)
        groups.setdefault(key, []).append(row)
    cells = []
    for key, group in groups.items():
        rate = best_rate([row for row in group if row["seed"] == group[0]["seed"]])
        chosen = [row for row in group if row["learning_rate"] == rate]
        seconds = statistics.median(row["step_seconds"] for row in group)
        cells.append(Cell(*key, rate, tuple(chosen), seconds))
    return cells


def table(cells: Sequence[Cell]) -> str:
    """Returns the cells as a Markdown table."""
    lines = [
        "| method | projection | rank | learning rate | validation loss | ms/update |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for cell in cells:
        lines.append(
            f"| {METHODS[cell.method].title} | {cell.projection or ''} "
            f"| {cell.rank or ''} | {cell.learning_rate:g} "
            f"| {cell.written()} | {1000 * cell.step_seconds:.0f} |"
        )
    return "\n".join(lines) + "\n"


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Draws a panel per compressed method: loss over rank, the full one as a line."""
    cells = [cell for cell in cells if math.isfinite(cell.mean)]
    if not cells:
        return  # Everything diverged; the table says so.
    kinds = list(dict.fromkeys(METHODS[cell.method].kind for cell in cells))
    figure = Figure(figsize=(4.8 * len(kinds) + 0.4, 4.2), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        _panel(axes, [cell for cell in cells if METHODS[cell.method].kind == kind])
        axes.set_title(f"The {kind}", fontsize=11)
        axes.set_xlabel("rank")
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("validation loss (nats per token)")
    figure.suptitle("Mean and standard error over seeds", fontsize=10)
    figure.savefig(path, dpi=150)


def _panel(axes: Axes, cells: Sequence[Cell]) -> None:
    for cell in cells:
        if cell.rank is None:
            axes.axhline(cell.mean, color="black", linestyle="--", label="full")
            low, high = cell.mean - cell.error, cell.mean + cell.error
            axes.axhspan(low, high, color="black", alpha=0.1)
    ranks = sorted({cell.rank for cell in cells if cell.rank is not None})
    names = list(dict.fromkeys(cell.projection for cell in cells if cell.projection))
    styles = zip(names, PALETTE, "os^Dv", strict=False)
    for i, (name, colour, mark) in enumerate(styles):
        mine = [cell for cell in cells if cell.projection == name]
        axes.errorbar(
            [ranks.index(cell.rank) + 0.12 * (i - len(names) / 2) for cell in mine],
            [cell.mean for cell in mine],
            [cell.error for cell in mine],
            color=colour,
            marker=mark,
            linestyle="none",
            capsize=3,
            label=name,
        )
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlim(-0.6, max(len(ranks), 1) - 0.4)
