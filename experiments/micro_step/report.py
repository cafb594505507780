"""What a micro-step costs with sketched gradients: a table and a picture."""

import json
import pathlib
from collections.abc import Sequence

from experiments.common import plots, report, timing
from experiments.common.methods import METHODS
from experiments.common.records import Row


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) next to the data."""
    content = json.loads(path.read_text())
    path.with_suffix(".md").write_text(report.markdown(_COLUMNS, content["rows"]))
    title = f"{timing.machine_title(content['machine'])}; medians"
    _draw(content["rows"], title, path.with_suffix(".png"))


def _times(row: Row) -> str:
    first, third = row["quartiles"]
    return f"{row['milliseconds']:.0f} ({first:.0f} to {third:.0f})"


_COLUMNS = {
    "model": lambda r: r["model"],
    "method": lambda r: METHODS[r["method"]].title,
    "projection": lambda r: r["projection"],
    "rank": lambda r: r["rank"],
    "FLOPs, relative": lambda r: f"{r['flops_ratio']:.3f}",
    "micro-step, ms (quartiles)": _times,
    "time, relative": lambda r: f"{r['milliseconds_ratio']:.2f}",
    "gradients, MB": lambda r: report.megabytes(r["gradient_output_bytes"], 1),
    "temporaries, MB": lambda r: report.megabytes(r["gradient_temp_bytes"], 0),
    "buffers of a weight's shape": lambda r: sum(r["weight_shaped_buffers"].values()),
}
"""FLOPs and time are relative to those of the first row of the model."""


def _draw(rows: Sequence[Row], title: str, path: pathlib.Path) -> None:
    """Draws FLOPs and time relative to full gradients, by rank; a row per model."""
    models = report.grouped(rows, "model")
    size, shape = (9.5, 3.2 * len(models) + 0.8), (len(models), 2)
    fields = {
        "flops_ratio": "FLOPs of the gradient function",
        "milliseconds_ratio": "time of a micro-step",
    }
    with plots.picture(path, size, shape, title, sharex=True) as panels:
        for line, ((model,), mine) in zip(panels, models.items(), strict=True):
            for axes, (field, name) in zip(line, fields.items(), strict=True):
                _lines(axes, mine, field)
                axes.set_title(f"{model}: {name}", fontsize=10)
                axes.set_ylim(0, 1.15 * max(1, *(row[field] for row in rows)))
            line[0].set_ylabel("relative to full gradients\nand full accumulation")
        for axes in panels[-1]:
            axes.set_xlabel("rank (logarithmic)")
        plots.legend_below(panels[0, 1])


def _lines(axes: plots.Axes, rows: Sequence[Row], field: str) -> None:
    full, *ours = rows
    title = METHODS[full["method"]].title
    axes.axhline(1, color="black", linewidth=1, label=title)
    projections = list(report.grouped(ours, "projection"))
    kinds = report.grouped(ours, "method", "projection")
    for (name, projection), mine in kinds.items():
        method, number = METHODS[name], projections.index((projection,))
        if field == "flops_ratio" and not method.sketched_gradients:
            continue  # The gradient function is the full one.
        x, y = zip(*((row["rank"], row[field]) for row in mine), strict=True)
        look = {"color": plots.PALETTE[number], "marker": plots.MARKS[number]}
        look["linestyle"] = "-" if method.sketched_gradients else ":"
        axes.plot(x, y, **look, label=f"{method.title}, {projection}")
    plots.log_ticks(axes, sorted({row["rank"] for row in ours}))


if __name__ == "__main__":
    report.main(write)
