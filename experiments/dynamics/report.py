"""What the measurements on the dynamics found: two tables and two pictures."""

import json
import pathlib
from typing import Any

import numpy as np

from experiments.common import plots, report
from experiments.common.methods import METHODS


def write(path: pathlib.Path) -> None:
    """Writes the tables (.md), cosine.png and perhaps spectra.png next to the data."""
    results = json.loads(path.read_text())
    traces, spectra = results["traces"], results["spectra"]
    tables = [report.markdown(_TRACES, traces)]
    _cosines(traces, path.parent / "cosine.png")
    if spectra:
        tables.append(report.markdown(_SPECTRA, spectra))
        _spectra(spectra, path.parent / "spectra.png")
    path.with_suffix(".md").write_text("\n".join(tables))


def _cosine(trace: dict[str, Any], share: float) -> str:
    points = trace["points"]
    wanted = share * points[-1]["update"]
    point = min(points, key=lambda point: abs(point["update"] - wanted))
    return f"{point['cosine']:.3f}"


_TRACES = {
    "LoRA trained by": lambda trace: trace["title"],
    "cosine after 1 update": lambda trace: _cosine(trace, 0),
    "at half": lambda trace: _cosine(trace, 0.5),
    "at the end": lambda trace: _cosine(trace, 1),
    "loss": lambda trace: f"{trace['points'][-1]['loss']:.3f}",
}


def _mean(spectrum: dict[str, Any], name: str) -> float:
    return float(np.mean([each[name] for each in spectrum["matrices"].values()]))


def _title(spectrum: dict[str, Any]) -> str:
    return report.ranked(METHODS[spectrum["method"]].title, spectrum["rank"])


_SPECTRA = {
    "method": _title,
    "learning rate": lambda s: f"{s['learning_rate']:g}",
    "validation loss": lambda s: f"{s['validation_loss']:.3f}",
    "effective rank of the change": lambda s: f"{_mean(s, 'effective_rank'):.0f}",
    "its size relative to the weight's": lambda s: f"{_mean(s, 'relative_change'):.2f}",
    "intruders in the first ten": lambda s: f"{_mean(s, 'intruders'):.1f}",
}
"""Means over the matrices."""


def _cosines(traces: list[dict[str, Any]], path: pathlib.Path) -> None:
    with plots.picture(path) as panels:
        axes = panels[0, 0]
        for number, trace in enumerate(traces):
            points = [(point["update"], point["cosine"]) for point in trace["points"]]
            dash, color = plots.DASHES[number % 4], plots.PALETTE[number]
            axes.plot(*zip(*points, strict=True), dash, c=color, label=trace["title"])
        axes.set(xscale="log", xlabel="updates (logarithmic)")
        axes.set_ylabel(
            "cosine of LoRA's change and\nthe projected accumulated gradient"
        )
        axes.set_ylim(top=1.03)
        axes.legend(title="LoRA trained by", frameon=False, fontsize=9)


def _spectra(spectra: list[dict[str, Any]], path: pathlib.Path) -> None:
    with plots.picture(path) as panels:
        axes = panels[0, 0]
        for number, spectrum in enumerate(spectra):
            values = [each["singular_values"] for each in spectrum["matrices"].values()]
            shortest = min(map(len, values))
            # The mean over the matrices, each relative to its largest.
            mean = np.mean([np.array(x[:shortest]) / x[0] for x in values], axis=0)
            dash = "--" if METHODS[spectrum["method"]].adapters else "-"
            look = {"color": plots.PALETTE[number], "label": _title(spectrum)}
            axes.plot(range(1, shortest + 1), np.maximum(mean, 1e-8), dash, **look)
        axes.set(yscale="log", ylim=(1e-4, 1.5), xlabel="index of the singular value")
        name = "singular values of the weights' change,\nrelative to the largest"
        axes.set_ylabel(name)
        axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    report.main(write)
