"""The benchmark's picture: what one step of each optimizer takes."""

import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

# From the palette of Okabe and Ito.
_COLOURS = {
    "optax": "#0072B2",
    "CountSketch": "#D55E00",
    "Gaussian": "#009E73",
    "refresh": "#CC79A7",
}
_OTHER = "#999999"
_TICKS = (1, 3, 10, 30, 100, 300, 1000, 3000, 10_000, 30_000, 100_000)


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draws a panel of bars per tree and type: milliseconds of a step."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["steps"]:
        panels.setdefault((row["tree"], row["dtype"]), []).append(row)
    sizes = [len(rows) + 3 for rows in panels.values()]
    figure = Figure(figsize=(9, 0.2 * sum(sizes) + 0.8), layout="constrained")
    axes = figure.subplots(
        len(panels), sharex=True, squeeze=False, height_ratios=sizes
    )[:, 0]
    for panel, ((tree, dtype), rows) in zip(axes, panels.items(), strict=True):
        _bars(panel, rows)
        panel.set_title(f"{tree}, {dtype}", fontsize=10)
    axes[-1].set_xlabel("milliseconds of one step (logarithmic)")
    machine = result["machine"]
    figure.suptitle(
        f"{machine.get('processor', machine['device'])}, {machine['cores']} cores:"
        " medians and quartiles; the dotted line is the floor",
        fontsize=10,
    )
    used = {_colour(row) for row in result["steps"]}
    kinds = [(word, colour) for word, colour in _COLOURS.items() if colour in used]
    kinds.append(("other", _OTHER))
    axes[0].legend(
        handles=[Patch(color=colour, label=name) for name, colour in kinds],
        fontsize=8,
        loc="upper right",
    )
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: (row["kind"], row["milliseconds"]))
    labels = [
        row["name"] + (f" r={row['rank']}" if row["rank"] else "") + _suffix(row)
        for row in rows
    ]
    places = range(len(rows))
    times = [row["milliseconds"] for row in rows]
    spread = [
        [row["milliseconds"] - row["quartiles"][0] for row in rows],
        [row["quartiles"][1] - row["milliseconds"] for row in rows],
    ]
    axes.barh(places, times, color=[_colour(row) for row in rows], xerr=spread)
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xscale("log")
    low, high = 0.5 * min([rows[0]["floor_milliseconds"], *times]), 1.6 * max(times)
    inside = [tick for tick in _TICKS if low <= tick <= high]
    axes.set_xlim(low, high)
    axes.set_xticks(inside, [str(tick) for tick in inside])
    axes.minorticks_off()
    axes.axvline(rows[0]["floor_milliseconds"], color="black", linestyle=":")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _suffix(row: dict[str, Any]) -> str:
    return "" if row["kind"] in ("optimizer", "accumulator") else f" ({row['kind']})"


def _colour(row: dict[str, Any]) -> str:
    if row["kind"] == "refresh":
        return _COLOURS["refresh"]
    words = (word for word in _COLOURS if word != "refresh" and word in row["name"])
    return _COLOURS.get(next(words, ""), _OTHER)
