"""The two pictures: loss curves and memory bars, safe for colour-blind readers."""

import math
import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.common.records import Row, Summary

# From the palette of Okabe and Ito; compressed and not also differ in line and marker.
_BLUE, _ORANGE, _GREY = "#0072B2", "#D55E00", "#BBBBBB"
_MIB = 2**20
_DPI = 150


def loss_curves(summaries: Sequence[Summary], path: pathlib.Path) -> None:
    """Draws a panel per kind of buffer, each method beside its compressed twin."""
    kinds = list(dict.fromkeys(summary.kind for summary in summaries))
    figure = Figure(figsize=(5.2 * len(kinds) + 0.6, 4.4), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0]
    for axes, kind in zip(panels, kinds, strict=True):
        for summary in summaries:
            if summary.kind == kind:
                _draw_losses(axes, summary)
        axes.set_title(f"The {kind}, full and compressed", fontsize=11)
        axes.set_xlabel("update")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    tokens = summaries[0].tokens_per_update
    panels[0].set_ylabel("cross-entropy (nats per token)")
    figure.suptitle(
        "Marked lines: validation loss. Thin lines: training loss of each update "
        f"({tokens:,} tokens)",
        fontsize=10,
    )
    figure.savefig(path, dpi=_DPI)


def _draw_losses(axes: Axes, summary: Summary) -> None:
    colour = _ORANGE if summary.compressed else _BLUE
    x, y = _series(summary.metrics, "loss")
    axes.plot(x, y, color=colour, alpha=0.35, linewidth=0.8)
    x, y = _series(summary.metrics, "validation_loss")
    axes.plot(
        x,
        y,
        color=colour,
        linestyle="--" if summary.compressed else "-",
        marker="s" if summary.compressed else "o",
        markersize=5,
        linewidth=1.6,
        label=f"{summary.title} ({summary.validation_loss:.3f})",
    )


def _series(rows: Sequence[Row], field: str) -> tuple[list[int], list[float]]:
    points = [(row["update"], row[field]) for row in rows if field in row]
    return [x for x, _ in points], [y for _, y in points]


def memory_bars(summaries: Sequence[Summary], path: pathlib.Path) -> None:
    """Draws the bytes of each optimizer's state, from zero, in one unit."""
    figure = Figure(figsize=(9.6, 1.9 + 0.62 * len(summaries)), layout="constrained")
    axes = figure.subplots()
    parts = (
        ("momentum or accumulator: matrices", _ORANGE, None),
        ("momentum or accumulator: embeddings, vectors", _BLUE, "///"),
        ("second moments, counters", _GREY, None),
    )
    labels = [summary.title for summary in summaries]
    left = [0.0] * len(summaries)
    for index, (label, colour, hatch) in enumerate(parts):
        widths = [_parts(summary)[index] / _MIB for summary in summaries]
        axes.barh(
            labels,
            widths,
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=label,
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for row, (summary, total) in enumerate(zip(summaries, left, strict=True)):
        matrices = summary.bytes.compressible / _MIB
        text = f" {total:.2f} MiB (matrices {matrices:.2f})"
        axes.text(total, row, text, va="center", fontsize=9)
    _finish_bars(axes, summaries, max(left))
    figure.savefig(path, dpi=_DPI)


def _parts(summary: Summary) -> tuple[int, int, int]:
    state = summary.bytes
    return state.compressible, state.dense, state.rest


def _finish_bars(axes: Axes, summaries: Sequence[Summary], longest: float) -> None:
    parameters = summaries[0].bytes.parameters / _MIB
    axes.axvline(parameters, color="black", linestyle=":", linewidth=1.2)
    axes.text(
        parameters,
        1.01,
        f"the model's parameters, {parameters:.2f} MiB",
        transform=axes.get_xaxis_transform(),
        ha="center",
        va="bottom",
        fontsize=8.5,
    )
    axes.invert_yaxis()
    axes.set_xlim(0, math.ceil(max(longest, parameters) * 1.4))
    axes.set_xlabel(
        "optimizer state kept between steps (MiB); every step also forms full gradients"
    )
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.42, -0.17),
        ncols=3,
        frameon=False,
        fontsize=8.5,
    )
