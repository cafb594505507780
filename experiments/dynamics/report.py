"""What the measurements on the dynamics found: a table and two pictures."""

import pathlib
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from experiments.finetune.methods import METHODS
from experiments.sweep.report import PALETTE

_DASHES = ("-", "--", "-.", ":")


def write(results: dict[str, Any], folder: pathlib.Path) -> None:
    """Writes the table (table.md) and the pictures (cosine.png, spectra.png)."""
    (folder / "table.md").write_text(table(results))
    _cosines(results["traces"], folder / "cosine.png")
    _spectra(results["spectra"], folder / "spectra.png")


def table(results: dict[str, Any]) -> str:
    """Returns both measurements as Markdown tables; means are over the matrices."""
    lines = [
        "| LoRA trained by | cosine after 1 update | at half | at the end | loss |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for trace in results["traces"]:
        points = trace["points"]
        middle = min(
            points, key=lambda point: abs(point["update"] - points[-1]["update"] / 2)
        )
        cosines = [f"{x['cosine']:.3f}" for x in (points[0], middle, points[-1])]
        lines.append(
            f"| {trace['title']} | {' | '.join(cosines)} | {points[-1]['loss']:.3f} |"
        )
    lines += [
        "",
        "| training | learning rate | validation loss | effective rank of the change |"
        " its size over the weight's | intruders in the first ten |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for spectrum in results["spectra"]:
        matrices = spectrum["matrices"].values()
        rank, size, intruders = (
            np.mean([each[name] for each in matrices])
            for name in ("effective_rank", "relative_change", "intruders")
        )
        lines.append(
            f"| {_title(spectrum)} | {spectrum['learning_rate']:g} "
            f"| {spectrum['validation_loss']:.3f} | {rank:.0f} | {size:.2f} "
            f"| {intruders:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _title(spectrum: dict[str, Any]) -> str:
    title = METHODS[spectrum["method"]].title
    return title if spectrum["rank"] is None else f"{title}, r={spectrum['rank']}"


def _cosines(traces: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for trace, colour, dashes in zip(traces, PALETTE, _DASHES * 2, strict=False):
        axes.plot(
            [point["update"] for point in trace["points"]],
            [point["cosine"] for point in trace["points"]],
            color=colour,
            linestyle=dashes,
            label=trace["title"],
        )
    axes.set_xscale("log")
    axes.set_xlabel("updates (logarithmic)")
    axes.set_ylabel("cosine of LoRA's change and\nthe projected accumulated gradient")
    axes.set_ylim(top=1.03)
    axes.grid(alpha=0.3)
    axes.legend(title="LoRA trained by", frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def _spectra(spectra: list[dict[str, Any]], path: pathlib.Path) -> None:
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for spectrum, colour in zip(spectra, PALETTE, strict=False):
        values = [each["singular_values"] for each in spectrum["matrices"].values()]
        shortest = min(map(len, values))
        # The mean over the matrices, each relative to its largest.
        mean = np.mean([np.array(x[:shortest]) / x[0] for x in values], axis=0)
        axes.plot(
            np.arange(1, shortest + 1),
            np.maximum(mean, 1e-8),
            color=colour,
            linestyle="--" if spectrum["method"].startswith("lora") else "-",
            label=_title(spectrum),
        )
    axes.set_yscale("log")
    axes.set_ylim(1e-4, 1.5)
    axes.set_xlabel("number of the singular value")
    axes.set_ylabel("singular values of the weights' change,\nrelative to the largest")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)
