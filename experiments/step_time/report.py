"""What one step of each optimizer takes: a table and a picture."""

import json
import operator
import pathlib

import numpy as np
from matplotlib.patches import Patch

from experiments.common import plots, report, timing
from experiments.common.records import Row

_WORDS = ("optax", "CountSketch", "Gaussian", "renewal")
_COLOURS = dict(zip(_WORDS, plots.PALETTE, strict=False))
_tree = operator.itemgetter("tree", "dtype")
_place = operator.itemgetter("tree", "dtype", "name", "rank")
_TICKS = [x * 10**k for k in range(6) for x in (1, 3)]


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) next to the data."""
    result = json.loads(path.read_text())
    text = table(result["steps"])
    if "compile" in result:
        text += "\n" + _compilation(result["compile"])
    path.with_suffix(".md").write_text(text)
    _draw(result, path.with_suffix(".png"))


def table(rows: list[Row]) -> str:
    """Returns a Markdown table: a line per optimizer, tree and type.

    A renewal is a step in which every matrix gets a new projection or basis.
    """
    names = {row["name"] for row in rows}
    adam = "optax.adamw" if "optax.adamw" in names else "optax.adam"
    of_adam = {_tree(row): row["milliseconds"] for row in rows if row["name"] == adam}
    renewals = {_place(row): row for row in rows if row["kind"] == "renewal"}

    def renewal(row: Row) -> str | None:
        if row["kind"] != "optimizer" or _place(row) not in renewals:
            return None
        taken = renewals[_place(row)]["milliseconds"]
        return f"{taken:.0f} ({taken / row['milliseconds']:.1f} steps)"

    columns = {
        "tree": lambda r: r["tree"],
        "type": lambda r: r["dtype"],
        "optimizer": lambda r: f"`{r['name']}`" + _suffix(r),
        "rank": lambda r: r["rank"],
        "step, ms": lambda r: f"{r['milliseconds']:.0f}",
        f"relative to {adam}": lambda r: f"{r['milliseconds'] / of_adam[_tree(r)]:.2f}",
        "to the floor": lambda r: f"{r['milliseconds'] / r['floor_milliseconds']:.1f}",
        "renewal, ms": renewal,
        "state, MB": lambda r: report.megabytes(r["state_bytes"], 1),
        "temporaries, MB": lambda r: report.megabytes(r["temp_bytes"], 1),
    }
    return report.markdown(columns, [row for row in rows if row["kind"] != "renewal"])


def _compilation(rows: list[Row]) -> str:
    columns = {
        "tree": lambda r: r["tree"],
        "optimizer": lambda r: f"`{r['name']}`",
        "rank": lambda r: r["rank"],
        "tracing, s": lambda r: f"{r['trace_seconds']:.1f}",
        "compilation, s": lambda r: f"{r['compile_seconds']:.1f}",
        "temporaries, MB": lambda r: report.megabytes(r["temp_bytes"], 1),
    }
    return report.markdown(columns, rows)


def _suffix(row: Row) -> str:
    return "" if row["kind"] in ("optimizer", "accumulator") else f" ({row['kind']})"


def _draw(result: Row, path: pathlib.Path) -> None:
    """Draws a panel of bars per tree and type: milliseconds of a step."""
    groups = report.grouped(result["steps"], "tree", "dtype")
    heights = [len(rows) + 3 for rows in groups.values()]
    title = timing.machine_title(result["machine"])
    title += ": medians and quartiles; the dotted line is the floor"
    size, shape = (9, 0.2 * sum(heights) + 0.8), (len(groups), 1)
    options = {"sharex": True, "height_ratios": heights}
    with plots.picture(path, size, shape, title, **options) as panels:
        for axes, (place, rows) in zip(panels[:, 0], groups.items(), strict=True):
            _bars(axes, rows)
            below = f"\n{title}" if len(groups) == 1 else ""
            axes.set_title(", ".join(place) + below, fontsize=10)
        axes.set_xlabel("milliseconds of one step (logarithmic)")
        used = {_color(row) for row in result["steps"]}
        kinds = {**_COLOURS, "other": plots.GREY}
        handles = [Patch(color=x, label=name) for name, x in kinds.items() if x in used]
        panels[0, 0].legend(handles=handles, fontsize=8, loc="upper right")


def _bars(axes: plots.Axes, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: (row["kind"], row["milliseconds"]))
    labels = [report.ranked(row["name"], row["rank"]) + _suffix(row) for row in rows]
    times = np.array([row["milliseconds"] for row in rows])
    first, third = np.array([row["quartiles"] for row in rows]).T
    spread = [times - first, third - times]
    places = range(len(rows))
    axes.barh(places, times, color=[_color(row) for row in rows], xerr=spread)
    axes.set_yticks(places, labels, fontsize=7)
    floor = rows[0]["floor_milliseconds"]
    low, high = 0.5 * min(floor, *times), 1.6 * max(times)
    plots.log_ticks(axes, [tick for tick in _TICKS if low <= tick <= high])
    axes.set(xlim=(low, high), ylim=(len(rows) - 0.4, -0.6))
    axes.axvline(floor, color="black", linestyle=":")


def _color(row: Row) -> str:
    if row["kind"] == "renewal":
        return _COLOURS["renewal"]
    return next((_COLOURS[x] for x in _WORDS if x in row["name"]), plots.GREY)


if __name__ == "__main__":
    report.main(write)
