"""What every picture is made of: one palette, error bars, bars in parts."""

import contextlib
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.report import mean_and_error

# Of Okabe and Ito, told apart by the color-blind too; marks differ in shape.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#555555")
GREY = "#BBBBBB"
MARKS = "osD^v<>Phd*pX"
DASHES = ("-", "--", "-.", ":")
LOSS = "validation loss (nats per token)"
SEEDS = "Mean and standard error over seeds"


@contextlib.contextmanager
def picture(
    path: pathlib.Path,
    size: tuple[float, float] = (7, 4.2),
    shape: tuple[int, int] = (1, 1),
    title: str = "",
    **options: Any,
) -> Iterator[np.ndarray]:
    """Gives panels, as an array of `shape`, and writes the picture at the end.

    Args:
        path: of the file.
        size: in inches.
        shape: rows and columns of panels.
        title: above them.
        **options: of `Figure.subplots`.
    """
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(*shape, squeeze=False, **options)
    for axes in panels.flat:
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
    if panels.size > 1:
        figure.suptitle(title, fontsize=10)
    else:  # Beside a legend outside, not above it.
        panels[0, 0].set_title(title, fontsize=10)
    yield panels
    figure.savefig(path, dpi=150)


def look(number: int) -> dict[str, str]:
    """Returns the color and the mark of a series."""
    color, mark = PALETTE[number % len(PALETTE)], MARKS[number % len(MARKS)]
    return {"color": color, "marker": mark}


def points(
    axes: Axes,
    x: Sequence[float],
    values: Iterable[Sequence[float]],
    number: int,
    **options: Any,
) -> None:
    """Draws means over seeds with their standard errors.

    A single seed has no error bar and has a hollow marker.

    Args:
        axes: the panel.
        x: places.
        values: those of all seeds at each place.
        number: chooses color and mark.
        **options: of `Axes.errorbar`.
    """
    values, style = list(values), look(number)
    means, errors = zip(*map(mean_and_error, values), strict=True)
    axes.errorbar(x, means, errors, capsize=3, **style | {"linestyle": ":"} | options)
    alone = [i for i, each in enumerate(values) if len(each) == 1]
    places, losses = [x[i] for i in alone], [means[i] for i in alone]
    axes.plot(places, losses, **style, mfc="white", linestyle="none", zorder=3)


def bars(
    axes: Axes, labels: Sequence[str], parts: Mapping[str, Sequence[float]]
) -> np.ndarray:
    """Draws a bar for each label, made of parts; the first label is at the top.

    Returns:
        The length of each bar.
    """
    colors = (GREY, PALETTE[4], PALETTE[1], "#F0E442", PALETTE[2])
    left = np.zeros(len(labels))
    for (name, widths), color in zip(parts.items(), colors, strict=False):
        axes.barh(labels, widths, left=left, color=color, edgecolor="w", label=name)
        left = left + np.asarray(widths)
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)
    return left


def log_ticks(axes: Axes, places: Iterable[float], labels: Iterable[Any] = ()) -> None:
    """Makes the x axis logarithmic, with ticks at some places only."""
    places = list(places)
    axes.set_xscale("log")
    axes.set_xticks(places, [str(x) for x in labels] or [f"{x:g}" for x in places])
    axes.minorticks_off()


def legend_below(axes: Axes, columns: int = 3) -> None:
    """Puts the legend of one panel below all of them."""
    entries = axes.get_legend_handles_labels()
    look = {"ncols": columns, "frameon": False, "fontsize": 8}
    axes.figure.legend(*entries, loc="outside lower center", **look)
