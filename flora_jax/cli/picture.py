"""Bars of bytes, drawn by matplotlib where it is installed."""

from __future__ import annotations

import importlib.util
import pathlib
from typing import TYPE_CHECKING

from flora_jax.memory.tables import format_bytes

if TYPE_CHECKING:
    from flora_jax.memory.planner import MemoryPlan

_COLOURS = ("#0072B2", "#E69F00", "#009E73")  # Of Okabe and Ito.


def problem(path: str) -> str | None:
    """Why no picture can be drawn there, or None."""
    if importlib.util.find_spec("matplotlib") is None:
        return "matplotlib is missing; pip install 'flora-jax[experiments]'"
    if pathlib.Path(path).suffix.lower() != ".png":
        return "must end in .png"
    if not pathlib.Path(path).absolute().parent.is_dir():
        return "its folder does not exist"
    return None


def draw(plan: MemoryPlan, name: str, path: str, budget: int | None = None) -> None:
    """Draws parameters, gradients and state, beside the peers' states.

    Args:
      plan: what to draw.
      name: of the transformation.
      path: the PNG file.
      budget: where to draw a line, in bytes.
    """
    from matplotlib.figure import Figure

    states = {name: plan.state_bytes, **plan.peers}
    own = plan.parameter_bytes
    totals = [2 * own + state for state in states.values()]
    unit = 1024 ** (3 if max(totals) >= 1024**3 else 2)
    figure = Figure(figsize=(9, 1.3 + 0.55 * len(states)), layout="constrained")
    axes = figure.subplots()
    parts = ("parameters", "gradients", "optimizer state")
    for i, (part, colour) in enumerate(zip(parts, _COLOURS, strict=True)):
        widths = [own / unit if i < 2 else state / unit for state in states.values()]
        axes.barh(
            list(states),
            widths,
            left=i * own / unit,
            color=colour,
            edgecolor="white",
            label=part,
        )
    for row, (state, total) in enumerate(zip(states.values(), totals, strict=True)):
        axes.text(
            total / unit + 0.01 * max(totals) / unit,
            row,
            f"{format_bytes(total)}, state {format_bytes(state)}",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
        )
    if budget is not None:
        label = f"budget {format_bytes(budget)}"
        axes.axvline(budget / unit, color="black", linestyle="--", label=label)
    axes.set_xlim(0, 1.45 * max(totals) / unit)
    axes.invert_yaxis()
    axes.set_xlabel(f"{'GiB' if unit == 1024**3 else 'MiB'}, without activations")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
