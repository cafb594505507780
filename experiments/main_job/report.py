"""The table at the end, on the screen and as a Markdown file, and the two pictures."""

import math
import pathlib
from collections.abc import Sequence

import numpy as np
from rich.console import Console

from experiments.common import display, plots, records
from experiments.common.methods import METHODS
from experiments.common.report import markdown

_COLUMNS = {
    "method": lambda row: row["title"],
    "optimizer state": lambda row: f"{row['state_bytes']:,}",
    "momentum or accumulator": lambda row: f"{row.get('buffer_bytes', 0):,}",
    "its matrices": lambda row: f"{row.get('matrix_bytes', 0):,}",
    "kept": lambda row: row.get("kept"),
    "s/update": lambda row: f"{row['step_seconds']:.3f}",
    "train loss": lambda row: f"{row['train_loss']:.3f}",
    "valid. loss": lambda row: f"{row['validation_loss']:.3f}",
}
_LEGEND = (
    "Bytes: of the whole optimizer state; of the buffer that FLORA compresses; of its "
    "part in the compressible matrices, and how much of their full size that is. "
    "s/update: median wall time, all micro-batches, no compilation. Losses in nats per "
    "token: training mean over the last tenth of the updates; validation after the "
    "last one, on a fixed set."
)
_PARTS = (
    "second moments, counters",
    "momentum or accumulator: embeddings, vectors",
    "momentum or accumulator: matrices",
)
_MIB = 2**20

Rows = Sequence[records.Row]


def write(rows: Rows, folder: pathlib.Path, console: Console) -> None:
    """Prints the table; writes it and the two pictures into `folder`."""
    first = rows[0]
    share = first.get("matrix_bytes_in_full", 0) / first["trained_bytes"]
    headline = (
        f"GPT-2 of {first['trained_bytes']:,} bytes of parameters, {share:.1%} of them "
        f"in compressible matrices; {first['updates']} updates of "
        f"{first['tokens_per_update']:,} tokens"
    )
    # Whether the bytes of each compressed method are what was promised.
    checks = [
        f"{row['title']}: {row['matrix_bytes']:,} of {row['matrix_bytes_in_full']:,} "
        f"bytes in matrices, {row['kept']}, which is "
        f"{'' if row['rank_over_width'] else 'NOT '}rank/width in every leaf."
        for row in rows
        if METHODS[row["method"]].compressed
    ]
    loss_curves(rows, folder)
    memory_bars(rows, folder)
    (folder / "report.md").write_text(_markdown(rows, headline, checks))
    console.print(headline)
    display.table(console, _COLUMNS, rows)
    for line in (_LEGEND, *checks):
        console.print(line)


def _markdown(rows: Rows, headline: str, checks: Sequence[str]) -> str:
    lines = "".join(f"- {line}\n" for line in checks)
    peaks = ", ".join(f"{row['title']} {row['learning_rate']:g}" for row in rows)
    return f"""# {headline}

{markdown(_COLUMNS, rows)}
{_LEGEND}

{lines}- Peak learning rates: {peaks}.
- The runs took turns, an update each: what else the machine did slowed all alike.
- Each (micro-)step still forms the full gradient, {rows[0]["trained_bytes"]:,} bytes
  for a moment; what is compressed lives on between the steps.

![Loss of each method over the updates](loss_curves.png)

![Bytes of each optimizer's state](memory.png)
"""


def loss_curves(rows: Rows, folder: pathlib.Path) -> None:
    """Draws a panel for momenta and one for accumulators, full and compressed."""
    kinds = list(dict.fromkeys(METHODS[row["method"]].kind for row in rows))
    title = (
        "Marked lines: validation loss. Thin lines: training loss of each update "
        f"({rows[0]['tokens_per_update']:,} tokens)"
    )
    path, shape = folder / "loss_curves.png", (1, len(kinds))
    size = (5.2 * len(kinds) + 0.6, 4.4)
    with plots.picture(path, size, shape, title, sharey=True) as panels:
        for axes, kind in zip(panels[0], kinds, strict=True):
            own = [row for row in rows if METHODS[row["method"]].kind == kind]
            for number, row in enumerate(own):
                metrics = records.read_rows(folder / row["run"] / "metrics.jsonl")
                _draw_losses(axes, row, metrics, number)
            axes.set_title(f"The {kind}, full and compressed", fontsize=11)
            axes.set_xlabel("update")
            axes.legend(frameon=False)
        panels[0][0].set_ylabel("cross-entropy (nats per token)")


def _draw_losses(
    axes: plots.Axes, row: records.Row, metrics: Rows, number: int
) -> None:
    look = plots.look(number)
    for name in ("loss", "validation_loss"):
        points = [(each["update"], each[name]) for each in metrics if name in each]
        x, y = zip(*points, strict=True)
        if name == "loss":
            axes.plot(x, y, color=look["color"], alpha=0.35, linewidth=0.8)
            continue
        look["linestyle"] = "--" if METHODS[row["method"]].compressed else "-"
        label = f"{row['title']} ({row['validation_loss']:.3f})"
        axes.plot(x, y, linewidth=1.6, label=label, **look)


def memory_bars(rows: Rows, folder: pathlib.Path) -> None:
    """Draws the bytes of each optimizer's state, from zero, in one unit."""
    parameters = rows[0]["trained_bytes"] / _MIB
    totals, buffers, matrices = (
        np.array([row.get(f"{name}_bytes", 0) / _MIB for row in rows])
        for name in ("state", "buffer", "matrix")
    )
    widths = (totals - buffers, buffers - matrices, matrices)
    size = (9.6, 1.9 + 0.62 * len(rows))
    with plots.picture(folder / "memory.png", size) as panels:
        axes = panels[0, 0]
        labels = [row["title"] for row in rows]
        plots.bars(axes, labels, dict(zip(_PARTS, widths, strict=True)))
        for place, (total, part) in enumerate(zip(totals, matrices, strict=True)):
            text = f" {total:.2f} MiB (matrices {part:.2f})"
            axes.text(total, place, text, va="center", fontsize=9)
        axes.axvline(parameters, color="black", linestyle=":", linewidth=1.2)
        axes.set_title(f"Dotted: the model's parameters, {parameters:.2f} MiB", size=9)
        axes.set_xlim(0, math.ceil(max(*totals, parameters) * 1.4))
        axes.set_xlabel(
            "optimizer state kept between steps (MiB); every step also forms full "
            "gradients"
        )
        plots.legend_below(axes)
