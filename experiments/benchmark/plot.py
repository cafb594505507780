"""The benchmark's picture: time of a step against the bytes of the state."""

import pathlib
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# From the palette of Okabe and Ito.
_COLOURS = {"optax": "#0072B2", "CountSketch": "#D55E00", "Gaussian": "#009E73"}
_OTHER = "#999999"


def draw(result: dict[str, Any], path: pathlib.Path) -> None:
    """Draws one panel of bars per tree and type: milliseconds of a step."""
    panels: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in result["steps"]:
        panels.setdefault((row["tree"], row["dtype"]), []).append(row)
    most = max(len(rows) for rows in panels.values())
    figure = Figure(
        figsize=(6.2 * len(panels), 0.27 * most + 1.6), layout="constrained"
    )
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, ((tree, dtype), rows) in zip(axes, panels.items(), strict=True):
        _bars(panel, rows)
        panel.set_title(f"{tree}, {dtype}", fontsize=10)
    figure.suptitle(
        f"One step on {result['machine'].get('processor', '')} "
        f"({result['machine']['device']}, {result['machine']['cores']} cores): medians "
        "and quartiles; the line is the floor",
        fontsize=10,
    )
    figure.savefig(path, dpi=130)


def _bars(axes: Axes, rows: list[dict[str, Any]]) -> None:
    rows = sorted(rows, key=lambda row: (row["kind"], row["milliseconds"]))
    labels = [
        f"{row['name']}" + (f" r={row['rank']}" if row["rank"] else "") + _suffix(row)
        for row in rows
    ]
    places = range(len(rows))
    times = [row["milliseconds"] for row in rows]
    spread = [
        [row["milliseconds"] - row["quartiles"][0] for row in rows],
        [row["quartiles"][1] - row["milliseconds"] for row in rows],
    ]
    axes.barh(places, times, color=[_colour(row["name"]) for row in rows], xerr=spread)
    axes.set_yticks(places, labels, fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlabel("milliseconds (logarithmic)")
    axes.axvline(rows[0]["floor_milliseconds"], color="black", linestyle=":")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)


def _suffix(row: dict[str, Any]) -> str:
    return "" if row["kind"] in ("optimizer", "accumulator") else f" ({row['kind']})"


def _colour(name: str) -> str:
    return next((c for word, c in _COLOURS.items() if word in name), _OTHER)
