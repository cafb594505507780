"""What one step of each optimizer takes: a table and a picture."""

import json
import pathlib
from typing import Any

from matplotlib.patches import Patch

from experiments.common import plots, report, timing
from experiments.common.records import Row
from experiments.common.report import megabytes

_COLOURS = dict(
    zip(("optax", "CountSketch", "Gaussian", "renewal"), plots.PALETTE, strict=False)
)
_TICKS = [x * 10**k for k in range(6) for x in (1, 3)]


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) beside the data."""
    result = json.loads(path.read_text())
    path.with_suffix(".md").write_text(table(result["steps"]))
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
        found = row["kind"] == "optimizer" and renewals.get(_place(row))
        if not found:
            return None
        ratio = found["milliseconds"] / row["milliseconds"]
        return f"{found['milliseconds']:.0f} ({ratio:.1f} steps)"

    columns: dict[str, Any] = {
        "tree": lambda row: row["tree"],
        "type": lambda row: row["dtype"],
        "optimizer": lambda row: f"`{row['name']}`" + _suffix(row),
        "rank": lambda row: row["rank"],
        "step, ms": lambda row: f"{row['milliseconds']:.0f}",
        f"relative to {adam}": lambda row: (
            f"{row['milliseconds'] / of_adam[_tree(row)]:.2f}"
        ),
        "to the floor": lambda row: (
            f"{row['milliseconds'] / row['floor_milliseconds']:.1f}"
        ),
        "renewal, ms": renewal,
        "state, MB": lambda row: megabytes(row["state_bytes"], 1),
        "temporaries, MB": lambda row: megabytes(row["temp_bytes"], 1),
    }
    return report.markdown(columns, [row for row in rows if row["kind"] != "renewal"])


def _tree(row: Row) -> tuple[str, str]:
    return row["tree"], row["dtype"]


def _place(row: Row) -> tuple[Any, ...]:
    return *_tree(row), row["name"], row["rank"]


def _suffix(row: Row) -> str:
    return "" if row["kind"] in ("optimizer", "accumulator") else f" ({row['kind']})"


def _draw(result: Row, path: pathlib.Path) -> None:
    """Draws a panel of bars per tree and type: milliseconds of a step."""
    groups: dict[str, list[Row]] = {}
    for row in result["steps"]:
        groups.setdefault(f"{row['tree']}, {row['dtype']}", []).append(row)
    heights = [len(rows) + 3 for rows in groups.values()]
    title = timing.machine_title(result["machine"])
    title += ": medians and quartiles; the dotted line is the floor"
    size, shape = (9, 0.2 * sum(heights) + 0.8), (len(groups), 1)
    options = {"sharex": True, "height_ratios": heights}
    with plots.picture(path, size, shape, title, **options) as panels:
        for axes, (name, rows) in zip(panels[:, 0], groups.items(), strict=True):
            _bars(axes, rows)
            axes.set_title(
                f"{name}\n{title}" if len(groups) == 1 else name, fontsize=10
            )
        axes.set_xlabel("milliseconds of one step (logarithmic)")
        used = {_color(row) for row in result["steps"]}
        kinds = {**_COLOURS, "other": plots.GREY}
        handles = [Patch(color=x, label=name) for name, x in kinds.items() if x in used]
        panels[0, 0].legend(handles=handles, fontsize=8, loc="upper right")


def _bars(axes: plots.Axes, rows: list[Row]) -> None:
    rows = sorted(rows, key=lambda row: (row["kind"], row["milliseconds"]))
    labels = [report.ranked(row["name"], row["rank"]) + _suffix(row) for row in rows]
    times = [row["milliseconds"] for row in rows]
    spread = [
        [row["milliseconds"] - row["quartiles"][0] for row in rows],
        [row["quartiles"][1] - row["milliseconds"] for row in rows],
    ]
    places = range(len(rows))
    axes.barh(places, times, color=[_color(row) for row in rows], xerr=spread)
    axes.set_yticks(places, labels, fontsize=7)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    floor = rows[0]["floor_milliseconds"]
    low, high = 0.5 * min(floor, *times), 1.6 * max(times)
    plots.log_ticks(axes, [tick for tick in _TICKS if low <= tick <= high])
    axes.set_xlim(low, high)
    axes.axvline(floor, color="black", linestyle=":")


def _color(row: Row) -> str:
    if row["kind"] == "renewal":
        return _COLOURS["renewal"]
    words = (word for word in _COLOURS if word in row["name"])
    return _COLOURS.get(next(words, ""), plots.GREY)


if __name__ == "__main__":
    report.main(write)
