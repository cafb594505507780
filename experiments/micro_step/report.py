"""Table and picture of `experiments.micro_step`."""

import pathlib
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.sweep.report import PALETTE

Row = dict[str, Any]

_TITLES = {
    "multi_steps": "full gradients, `optax.MultiSteps`",
    "flora": "full gradients, `compressed_accumulation`",
    "sketched": "sketched gradients, `compressed_accumulation`",
}
_HEADS = (
    "model",
    "gradients and accumulator",
    "projection",
    "rank",
    "FLOPs",
    "micro-step, ms (quartiles)",
    "time",
    "gradients, MB",
    "temporaries, MB",
    "buffers of a weight's shape",
)


def table(rows: Sequence[Row]) -> str:
    """Returns a Markdown table; FLOPs and time are over those of the first row."""
    lines = [_line(_HEADS), _line(["---"] * 3 + ["---:"] * 7)]
    for row in rows:
        first, third = row["quartiles"]
        lines.append(
            _line(
                [
                    row["model"],
                    _TITLES[row["method"]],
                    row["projection"] or "",
                    row["rank"] or "",
                    f"{row['flops_ratio']:.3f}",
                    f"{row['milliseconds']:.0f} ({first:.0f} to {third:.0f})",
                    f"{row['milliseconds_ratio']:.2f}",
                    f"{row['gradient_output_bytes'] / 1e6:.1f}",
                    f"{row['gradient_temp_bytes'] / 1e6:.0f}",
                    sum(row["weight_shaped_buffers"].values()),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def draw(rows: Sequence[Row], machine: Row, path: pathlib.Path) -> None:
    """Draws FLOPs and time over those of full gradients, by rank; a row per model."""
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(9.5, 3.2 * len(models) + 0.8), layout="constrained")
    panels = figure.subplots(len(models), 2, sharex=True, squeeze=False)
    fields = {
        "flops_ratio": "FLOPs of the gradient function",
        "milliseconds_ratio": "time of a micro-step",
    }
    for line, model in zip(panels, models, strict=True):
        for axes, (field, title) in zip(line, fields.items(), strict=True):
            _lines(axes, [row for row in rows if row["model"] == model], field)
            axes.set_title(f"{model}: {title}", fontsize=10)
            axes.set_ylim(0, 1.15 * max(1, *(row[field] for row in rows)))
            axes.grid(alpha=0.3)
        line[0].set_ylabel("over full gradients\nand optax.MultiSteps")
    for axes in panels[-1]:
        axes.set_xlabel("rank (logarithmic)")
    handles, labels = panels[0][1].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=8
    )
    device = machine.get("processor", machine["device"])
    figure.suptitle(f"{device}, {machine['cores']} cores; medians", fontsize=10)
    figure.savefig(path, dpi=150)


def _lines(axes: Any, rows: Sequence[Row], field: str) -> None:
    axes.axhline(1, color="black", linewidth=1, label="full gradients, MultiSteps")
    kinds = list(dict.fromkeys((row["method"], row["projection"]) for row in rows[1:]))
    projections = list(dict.fromkeys(projection for _, projection in kinds))
    for kind in kinds:
        method, projection = kind
        mine = [row for row in rows if (row["method"], row["projection"]) == kind]
        sketched, place = method == "sketched", projections.index(projection)
        if field == "flops_ratio" and not sketched:
            continue  # The gradient function is the full one.
        axes.plot(
            [row["rank"] for row in mine],
            [row[field] for row in mine],
            color=PALETTE[place],
            marker="os^Dv"[place],
            linestyle="-" if sketched else ":",
            label=f"{'sketched' if sketched else 'full'} gradients, {projection}",
        )
    axes.set_xscale("log", base=2)
    ranks = sorted({row["rank"] for row in rows[1:]})
    axes.set_xticks(ranks, [str(rank) for rank in ranks])
    axes.xaxis.set_minor_locator(NullLocator())
