"""What ways of averaging gradients over devices came to: table and picture."""

import math
import pathlib
import statistics
from typing import NamedTuple

from matplotlib.figure import Figure

from experiments.common import records

# From the palette of Okabe and Ito.
_COLOURS = {"plain": "#0072B2", "sketch": "#D55E00", "feedback": "#009E73"}
_LINES = ("-", "--", ":", "-.")


class Way(NamedTuple):
    """How gradients are averaged."""

    name: str
    """plain, sketch or feedback."""
    rank: int = 0

    @property
    def title(self) -> str:
        """For people."""
        kinds = {"plain": "gradients", "sketch": "sketches", "feedback": "sketches, EF"}
        return kinds[self.name] + (f", r={self.rank}" if self.rank else "")


def _mean_and_error(losses: list[float]) -> tuple[float, float]:
    """Mean and standard error over seeds."""
    spread = statistics.stdev(losses) if len(losses) > 1 else math.nan
    return statistics.mean(losses), spread / math.sqrt(len(losses))


def _title(row: records.Row) -> str:
    return Way(row["way"], row["rank"]).title


def table(best: list[list[records.Row]]) -> str:
    """Returns a Markdown table, a line for each way."""
    lines = [
        "| averaged | learning rate | seeds | bytes reduced per update | part of all |"
        " validation loss |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    whole = best[0][0]["bytes_reduced"]
    for rows in best:
        mean, error = _mean_and_error([row["validation_loss"] for row in rows])
        sent = rows[0]["bytes_reduced"]
        lines.append(
            f"| {_title(rows[0])} | {rows[0]['learning_rate']:g} | {len(rows)} "
            f"| {sent:,} | {sent / whole:.3f} | {mean:.3f} ± {error:.3f} |"
        )
    return "\n".join(lines) + "\n"


def draw(best: list[list[records.Row]], path: pathlib.Path) -> None:
    """Draws the validation loss over the updates: mean and standard error."""
    figure = Figure(figsize=(7.6, 4.6), layout="constrained")
    axes = figure.subplots()
    ranks = sorted({rows[0]["rank"] for rows in best})
    styles = dict(zip(ranks, _LINES * len(ranks), strict=False))
    whole = best[0][0]["bytes_reduced"]
    for rows in best:
        points = list(zip(*(row["curve"] for row in rows), strict=True))
        losses = [[loss for _, loss in point] for point in points]
        label = (
            f"{_title(rows[0])}: {rows[0]['bytes_reduced'] / whole:.0%} of the bytes"
        )
        axes.errorbar(
            [point[0][0] for point in points],
            *zip(*map(_mean_and_error, losses), strict=True),
            color=_COLOURS[rows[0]["way"]],
            linestyle=styles[rows[0]["rank"]],
            marker="o",
            markersize=4,
            capsize=3,
            label=label,
        )
    axes.set_xlabel("update")
    axes.set_ylabel("validation loss (nats per token)")
    count = best[0][0]["devices"]
    axes.set_title(
        f"What {count} devices average, each way at its best learning rate;"
        f" {len(best[0])} seeds",
        fontsize=10,
    )
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
