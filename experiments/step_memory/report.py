"""The table and the picture of the memory of a training step."""

import pathlib

import numpy as np

from experiments.common import plots, report
from experiments.common.methods import METHODS
from experiments.common.records import Row, read_rows

_GIB = 2**30
_PARTS = ("parameters", "state", "temporaries")
_CAPTION = """\
GiB on one chip, by its compiler, of one program that computes a loss and its gradients
and updates the parameters, donated as the state is. Of an accumulation over 16
micro-steps it is the program that does both: adds to the accumulator and, at the end of
a cycle, applies. The optimizer is Adafactor, except for Adam, whose moments have the
parameters' type, and GaLore (Adam in a subspace, float32 moments). A v5e has 15.75 GiB.
The total is a sum of the compiler's figures, which may slightly exceed the peak.
"""


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) beside the rows."""
    rows = read_rows(path)
    columns = {
        "model": lambda row: row["model"],
        "method": _title,
        "rank": lambda row: row["rank"],
        "tokens": _tokens,
        **{name: _gib(name) for name in (*_PARTS, "total")},
        "needed, if refused": _gib("refused"),
    }
    text = _CAPTION
    for (chip, dtype, remat, scan), group in report.grouped(
        rows, "chip", "dtype", "remat", "scan"
    ).items():
        layers = "scanned" if scan else "unrolled"
        kept = "activations of a layer recomputed" if remat else "activations kept"
        text += f"\n## {chip}, {dtype}, layers {layers}, {kept}\n\n"
        text += report.markdown(columns, group)
    path.with_suffix(".md").write_text(text)
    _draw(rows, path.with_suffix(".png"))


def _title(row: Row) -> str:
    title = METHODS[row["method"]].title
    if row["embeddings"]:
        title += ", embeddings too"
    if row["accumulator_dtype"] != "float32":
        title += f", in {row['accumulator_dtype']}"
    return title


def _short(row: Row) -> str:
    return (
        _title(row)
        .replace("LoRA accumulation", "LoRA")
        .replace("FLORA accumulation", "FLORA")
    )


def _with_refused(row: Row) -> Row:
    """The row with temporaries and total of a program that is refused, too."""
    if "refused" not in row:
        return row
    rest = row["refused"] - row["parameters"] - row["state"]
    return row | {"total": row["refused"], "temporaries": rest}


def _tokens(row: Row) -> str:
    lengths = f"{row['source_length']} + {row['target_length']}"
    return f"{row['batch_size']} x ({lengths})"


def _gib(name: str):
    return lambda row: f"{row[name] / _GIB:.2f}" if name in row else None


def _draw(rows: list[Row], path: pathlib.Path) -> None:
    """Draws a panel of bars per model and chip; of refused programs, too."""
    fields = ("chip", "model", "dtype", "batch_size", "source_length", "target_length")
    groups = report.grouped(list(map(_with_refused, rows)), *fields, "remat", "scan")
    heights = [len(group) + 1.5 for group in groups.values()]
    size, shape = (9, 0.3 * sum(heights) + 1.2), (len(groups), 1)
    with plots.picture(path, size, shape, height_ratios=heights) as panels:
        for axes, (case, group) in zip(panels[:, 0], groups.items(), strict=True):
            labels = [report.ranked(_short(row), row["rank"]) for row in group]
            parts = {x: np.array([row[x] for row in group]) / _GIB for x in _PARTS}
            plots.bars(axes, labels, parts)
            totals = [
                f"{row['total'] / _GIB:.1f}" + " (refused)" * ("refused" in row)
                for row in group
            ]
            axes.bar_label(axes.containers[-1], totals, padding=3, fontsize=8)
            axes.set_title(f"{', '.join(case[:3])}, {_tokens(group[0])}", fontsize=10)
            axes.margins(x=0.22)
        axes.set_xlabel("GiB of one chip")
        plots.legend_below(axes)


if __name__ == "__main__":
    report.main(write)
