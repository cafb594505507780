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


def draw(
    plan: MemoryPlan, name: str, path: str, gradients: int, budget: int | None = None
) -> None:
    """Draws parameters, gradients and state, compared with those of the peers.

    Args:
      plan: what to draw.
      name: of the transformation.
      path: the PNG file.
      gradients: bytes of the gradients that the transformation takes, or of their
        sketches.
      budget: where to draw a line, in bytes.
    """
    from matplotlib.figure import Figure

    states = {name: plan.state_bytes, **plan.peers}
    own = plan.parameter_bytes
    sizes = np.array(list(states.values()))
    steps = np.array([gradients] + [own] * len(plan.peers))
    totals = own + steps + sizes
    largest = totals.max()
    unit = 1024 ** (3 if largest >= 1024**3 else 2)
    figure = Figure(figsize=(9, 1.3 + 0.55 * len(states)), layout="constrained")
    axes = figure.subplots()
    taken = "gradients" if gradients == own else "gradients or their sketches"
    parts = {"parameters": own, taken: steps, "optimizer state": sizes}
    bar = functools.partial(axes.barh, list(states), edgecolor="white")
    lefts = [0, own, own + steps]
    bars = [
        bar(parts[part] / unit, left=left / unit, color=color, label=part)
        for part, left, color in zip(parts, lefts, _COLOURS, strict=True)
    ]
    labels = [
        f"{format_bytes(int(total))}, state {format_bytes(int(size))}"
        for total, size in zip(totals, sizes, strict=True)
    ]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(bars[-1], labels, padding=4, fontsize=9, bbox=box)
    if budget is not None:
        label = f"budget {format_bytes(budget)}"
        axes.axvline(budget / unit, color="black", linestyle="--", label=label)
    axes.set_xlim(0, 1.45 * largest / unit)
    axes.invert_yaxis()
    axes.set_xlabel(f"{'GiB' if unit == 1024**3 else 'MiB'}, without activations")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=4, frameon=False)
    figure.savefig(path, dpi=150)
