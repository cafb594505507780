"""What trainings found that differ in how often the momentum is resampled."""

import math
import pathlib
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments.claims.report import table as table
from experiments.sweep.report import PALETTE, Cell


def stability_limit(decay: float, rank: int, width: int) -> float:
    """Returns the interval κ at which decay^(2κ)·width/rank is 1.

    Each transfer multiplies the expected square of the momentum by width/rank, and
    between two of them it decays: with fewer updates in between it grows without bound.
    """
    return math.log(width / rank) / (2 * math.log(1 / decay))


def draw(cells: Sequence[Cell], path: pathlib.Path) -> None:
    """Draws loss over the interval, "never" at the right, and the stability limit.

    All cells are of one rank, whose limit it is.
    """
    cells = [cell for cell in cells if math.isfinite(cell.mean)]
    if not cells:
        return  # The table says so.
    row = cells[0].rows[0]
    found = {cell.rows[0]["options"]["resample_every"]: cell for cell in cells}
    finite = sorted(every for every in found if every is not None)
    never = 10 * max(finite, default=1)
    ordered = [*finite, *([None] if None in found else [])]
    places = [never if every is None else every for every in ordered]
    means = [found[every].mean for every in ordered]
    errors = [found[every].error for every in ordered]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    look = {"color": PALETTE[0], "marker": "o", "linestyle": ":", "capsize": 3}
    axes.errorbar(places, means, errors, **look, label=f"FLORA, r={row['rank']}")
    limit = stability_limit(row["momentum"], row["rank"], row["model"]["width"])
    axes.axvline(limit, color=PALETTE[1], linestyle="--")
    axes.axvspan(0.5, limit, color=PALETTE[1], alpha=0.12)
    axes.annotate(
        f"the momentum grows\nwithout bound\nbelow {limit:.1f}",
        (limit, 0.98),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        horizontalalignment="right",
        verticalalignment="top",
        fontsize=9,
    )
    axes.set_xscale("log")
    axes.set_xlim(0.5, 2 * max(places))
    axes.set_xticks(places, ["never" if x is None else str(x) for x in ordered])
    axes.minorticks_off()
    axes.set_xlabel("updates between two projections")
    axes.set_ylabel("validation loss (nats per token)")
    axes.set_title("Mean and standard error over seeds", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
