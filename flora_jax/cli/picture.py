"""Bar charts of memory, drawn by matplotlib where it is installed."""

from __future__ import annotations

import functools
import importlib.util
import pathlib

import numpy as np

from flora_jax.memory.planner import MemoryPlan, format_bytes

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
    """Draws parameters, gradients and state, compared with those of the peers.

    Args:
      plan: what to draw.
      name: of the transformation.
      path: the PNG file.
      budget: where to draw a line, in bytes.
    """
    from matplotlib.figure import Figure

    states = {name: plan.state_bytes, **plan.peers}
    own = plan.parameter_bytes
    largest = 2 * own + max(states.values())
    unit = 1024 ** (3 if largest >= 1024**3 else 2)
    figure = Figure(figsize=(9, 1.3 + 0.55 * len(states)), layout="constrained")
    axes = figure.subplots()
    sizes = np.array(list(states.values()))
    parts = {"parameters": own, "gradients": own, "optimizer state": sizes}
    bar = functools.partial(axes.barh, list(states), edgecolor="white")
    bars = [
        bar(size / unit, left=i * own / unit, color=_COLOURS[i], label=part)
        for i, (part, size) in enumerate(parts.items())
    ]
    totals = [f"{format_bytes(2 * own + x)}, state {format_bytes(x)}" for x in sizes]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars[-1], totals, padding=4, fontsize=9, bbox=box)
    if budget is not None:
        label = f"budget {format_bytes(budget)}"
        axes.axvline(budget / unit, color="black", linestyle="--", label=label)
    axes.set_xlim(0, 1.45 * largest / unit)
    axes.invert_yaxis()
    axes.set_xlabel(f"{'GiB' if unit == 1024**3 else 'MiB'}, without activations")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
