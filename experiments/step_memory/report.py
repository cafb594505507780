"""The table and the picture of the memory of a training step."""

import json
import pathlib
from typing import Any

from experiments.common import plots, report
from experiments.common.methods import METHODS
from experiments.common.records import Row

_GIB = 2**30
_SIZES = ("parameters", "optimizer", "accumulator", "accumulate_step", "apply_step")


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) beside the data."""
    content = json.loads(path.read_text())
    rows = content["rows"]
    columns: dict[str, Any] = {
        "model": lambda row: row["model"],
        "method": lambda row: METHODS[row["method"]].title,
        "rank": lambda row: row["rank"],
    }
    for name in _SIZES:
        columns[name.replace("_", " ")] = lambda row, name=name: (
            f"{row[name] / _GIB:.3f}"
        )
    text = f"{_caption(content['config'])}\n\n{report.markdown(columns, rows)}"
    path.with_suffix(".md").write_text(text)
    _draw(rows, path.with_suffix(".png"))


def _caption(config: dict[str, Any]) -> str:
    layers = "scanned" if config["scan"] else "unrolled"
    activations = "recomputed" if config["remat"] else "kept"
    return (
        f"GiB; Adafactor unless Adam is said; {config['dtype']} computation, float32 "
        f"parameters and state; micro-batches of {config['batch_size']} with "
        f"{config['source_length']} + {config['target_length']} tokens; layers "
        f"{layers}, activations {activations}."
    )


def _draw(rows: list[Row], path: pathlib.Path) -> None:
    """Draws a panel of bars per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    groups = [[row for row in rows if row["model"] == model] for model in models]
    heights = [len(group) + 1.5 for group in groups]
    size, shape = (9, 0.34 * sum(heights) + 1.2), (len(models), 1)
    with plots.picture(path, size, shape, height_ratios=heights) as panels:
        for axes, model, group in zip(panels[:, 0], models, groups, strict=True):
            _bars(axes, group)
            axes.set_title(model, fontsize=10)
        axes.set_xlabel("GiB of one device")
        plots.legend_below(axes)


def _bars(axes: plots.Axes, rows: list[Row]) -> None:
    labels = [report.ranked(METHODS[row["method"]].title, row["rank"]) for row in rows]
    parts = {
        name: [row[name] / _GIB for row in rows]
        for name in ("parameters", "optimizer", "accumulator")
    }
    parts["temporaries of the larger step"] = [
        max(row["accumulate_temporaries"], row["apply_temporaries"]) / _GIB
        for row in rows
    ]
    totals = plots.bars(axes, labels, parts)
    axes.plot(
        [row["accumulate_step"] / _GIB for row in rows],
        range(len(rows)),
        color="black",
        marker="|",
        markersize=12,
        markeredgewidth=2,
        linestyle="none",
        label="accumulate step alone",
    )
    for y, total in enumerate(totals):
        axes.text(total, y, f" {total:.1f}", va="center", fontsize=8)
    axes.set_xlim(0, 1.1 * max(totals))


if __name__ == "__main__":
    report.main(write)
