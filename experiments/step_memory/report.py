"""The table and the picture of the memory of a training step."""

import pathlib
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.step_memory.config import Config
from experiments.step_memory.measure import Row

_GIB = 2**30
_TITLES = {
    "adam": "Adam, full accumulation",
    "naive": "Adafactor, full accumulation",
    "lora": "LoRA",
    "flora": "FLORA",
    "sketched": "FLORA, sketched gradients",
}
_COLUMNS = (
    "model",
    "method",
    "rank",
    "parameters",
    "optimizer",
    "accumulator",
    "accumulate step",
    "apply step",
)
# From the palette of Okabe and Ito.
_PARTS = (
    ("parameters", "#BBBBBB", None),
    ("optimizer state", "#56B4E9", None),
    ("accumulator", "#D55E00", None),
    ("temporaries of the larger step", "#F0E442", "///"),
)


def label(row: Row) -> str:
    """Returns the name of a method, with its rank."""
    title = _TITLES[row.method]
    return title if row.rank is None else f"{title}, rank {row.rank}"


def table(config: Config, rows: Sequence[Row]) -> str:
    """Returns a Markdown table, in GiB, under what it was measured with."""
    layers = "scanned" if config.scan else "unrolled"
    activations = "computed again" if config.remat else "kept"
    lines = [
        f"GiB; {config.dtype} computation, float32 parameters and state; micro-batches "
        f"of {config.batch_size} with {config.source_length} + {config.target_length} "
        f"tokens; layers {layers}, activations {activations}.",
        "",
        f"| {' | '.join(_COLUMNS)} |",
        "| --- | --- |" + " ---: |" * (len(_COLUMNS) - 2),
    ]
    for row in rows:
        sizes = (
            row.parameters,
            row.optimizer,
            row.accumulator,
            row.accumulate_step,
            row.apply_step,
        )
        cells = " | ".join(f"{size / _GIB:.3f}" for size in sizes)
        name = f"{row.model} | {_TITLES[row.method]} | {row.rank or ''}"
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row], path: pathlib.Path) -> None:
    """Draws a panel of bars per model."""
    models = list(dict.fromkeys(row.model for row in rows))
    groups = [[row for row in rows if row.model == model] for model in models]
    heights = [len(group) + 1.5 for group in groups]
    figure = Figure(figsize=(9, 0.34 * sum(heights) + 1.2), layout="constrained")
    panels = figure.subplots(len(models), squeeze=False, height_ratios=heights)[:, 0]
    for axes, model, group in zip(panels, models, groups, strict=True):
        _bars(axes, group)
        axes.set_title(model, fontsize=10)
    panels[-1].set_xlabel("GiB of one device")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)


def _bars(axes: Axes, rows: Sequence[Row]) -> None:
    left = [0.0] * len(rows)
    for i, (name, colour, hatch) in enumerate(_PARTS):
        widths = [_parts(row)[i] / _GIB for row in rows]
        axes.barh(
            [label(row) for row in rows],
            widths,
            left=left,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name,
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.plot(
        [row.accumulate_step / _GIB for row in rows],
        range(len(rows)),
        color="black",
        marker="|",
        markersize=12,
        markeredgewidth=2,
        linestyle="none",
        label="accumulate step alone",
    )
    for y, total in enumerate(left):
        axes.text(total, y, f" {total:.1f}", va="center", fontsize=8)
    axes.set_xlim(0, 1.1 * max(left))
    axes.invert_yaxis()
    axes.tick_params(labelsize=8)


def _parts(row: Row) -> tuple[int, int, int, int]:
    temporaries = max(row.accumulate_temporaries, row.apply_temporaries)
    return row.parameters, row.optimizer, row.accumulator, temporaries
