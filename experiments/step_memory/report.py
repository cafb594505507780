"""The table and the picture of the memory of a training step."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments.common import plots, report
from experiments.common.methods import METHODS
from experiments.common.records import Row

_GIB = 2**30
_SIZES = ("parameters", "optimizer", "accumulator", "accumulate_step", "apply_step")
_MORE = ("accumulate_temporaries", "apply_temporaries")


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) beside the data."""
    content = json.loads(path.read_text())
    rows = content["rows"]
    columns: dict[str, Any] = {
        "model": lambda row: row["model"],
        "method": lambda row: METHODS[row["method"]].title,
        "rank": lambda row: row["rank"],
    }
    for x in _SIZES:
        columns[x.replace("_", " ")] = lambda row, x=x: f"{row[x] / _GIB:.3f}"
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
    models = report.grouped(rows, "model")
    heights = [len(group) + 1.5 for group in models.values()]
    size, shape = (9, 0.34 * sum(heights) + 1.2), (len(models), 1)
    with plots.picture(path, size, shape, height_ratios=heights) as panels:
        for axes, ((model,), group) in zip(panels[:, 0], models.items(), strict=True):
            _bars(axes, group)
            axes.set_title(model, fontsize=10)
        axes.set_xlabel("GiB of one device")
        plots.legend_below(axes)


def _bars(axes: plots.Axes, rows: list[Row]) -> None:
    labels = [report.ranked(METHODS[row["method"]].title, row["rank"]) for row in rows]
    gib = {x: np.array([row[x] for row in rows]) / _GIB for x in (*_SIZES, *_MORE)}
    parts = {x: gib[x] for x in ("parameters", "optimizer", "accumulator")}
    parts["temporaries of the larger step"] = np.maximum(*(gib[x] for x in _MORE))
    totals = [f"{x:.1f}" for x in plots.bars(axes, labels, parts)]
    look = {"color": "black", "linewidths": 2, "label": "accumulate step alone"}
    axes.scatter(gib["accumulate_step"], labels, 144, marker="|", zorder=3, **look)
    axes.bar_label(axes.containers[-1], totals, padding=3, fontsize=8)
    axes.margins(x=0.1)


if __name__ == "__main__":
    report.main(write)
