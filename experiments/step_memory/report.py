"""The table and the picture of the memory of a training step."""

import itertools
import pathlib
from typing import Any

import numpy as np

from experiments.common import plots, report
from experiments.common.methods import METHODS
from experiments.common.records import Row, read_rows

_GIB = 2**30
_LIMIT = 15.75  # GiB of a v5e that a program can use.
_PARTS = ("parameters", "state", "temporaries")
_TITLES = ("parameters", "state", "temporaries: gradients, activations")
_CAPTION = """\
GiB on one chip, by its compiler, of one program that computes a loss and its gradients
and updates the parameters, donated as the state is. Of an accumulation over 16
micro-steps it is the program that does both: adds to the accumulator and, at the end of
a cycle, applies. The optimizer is Adafactor, except for Adam, whose moments have the
parameters' type, and GaLore (Adam in a subspace, float32 moments). A v5e has 15.75 GiB.
The total is a sum of the compiler's figures, which may slightly exceed the peak.
Activations are what the loss keeps for its backward pass, besides parameters, without
sketches of them; gradients, or their sketches, are not all in memory at once.
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
        "of temporaries: activations": _gib("activations"),
        "gradients or sketches, if all at once": _gib("gradients"),
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
    _draw_parts(rows, path.with_name("parts.png"))


def _title(row: Row) -> str:
    title = METHODS[row["method"]].title
    if row["embeddings"]:
        title += ", embeddings too"
    if row["accumulator_dtype"] != "float32":
        title += f", in {row['accumulator_dtype']}"
    if row["rounding"] != "nearest":
        title += f", {row['rounding']} rounding"
    return title


def _short(row: Row) -> str:
    if row["method"] == "flora":
        return "FLORA, no accumulation"
    return (
        _title(row)
        .replace("LoRA accumulation", "LoRA")
        .replace("FLORA accumulation", "FLORA")
        .replace("gradients, embeddings too", "gradients + embeddings")
        .replace("No accumulation", "SGD")
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
    """Draws bars in parts, of refused programs as well: models by chips."""
    fields = ("model", "dtype", "batch_size", "source_length", "target_length")
    groups = report.grouped(list(map(_with_refused, rows)), *fields, "remat", "scan")
    chips = list(dict.fromkeys(row["chip"] for row in rows))
    labels = [list(dict.fromkeys(map(_label, group))) for group in groups.values()]
    heights = [len(each) + 1.5 for each in labels]
    size = 3 + 3.3 * len(chips), 0.22 * sum(heights) + 1
    shape = len(groups), len(chips)
    options = {"height_ratios": heights, "sharey": "row", "sharex": "row"}
    with plots.picture(path, size, shape, **options) as panels:
        for row_of_panels, group, names in zip(
            panels, groups.values(), labels, strict=True
        ):
            for axes, chip in zip(row_of_panels, chips, strict=True):
                of_chip = [row for row in group if row["chip"] == chip]
                _bars(axes, names, {_label(row): row for row in of_chip})
                case = f"{group[0]['model']}, {group[0]['dtype']}, {_tokens(group[0])}"
                axes.set_title(f"{chip}: {case}", fontsize=8)
            row_of_panels[0].invert_yaxis()
        for axes in panels[-1]:
            axes.set_xlabel("GiB of one chip", fontsize=8)
        plots.legend_below(panels[0, 0])


# The README's picture: on one v5e, at one rank.
_CHIP, _RANK = "v5e", 64
_MODELS = ("t5-3b", "llama-2-7b")
_METHODS = {
    "full_accumulation": "full accumulation",
    "galore": "GaLore",
    "lora_accumulation": "LoRA",
    "sketched_accumulation": "FLORA, sketched gradients",
}


def _draw_parts(rows: list[Row], path: pathlib.Path) -> None:
    """Draws the five parts of a step by four methods, beyond the chip's memory, too."""
    found = {
        (row["model"], row["method"]): _with_refused(row)
        for row in rows
        if (row["chip"], row["accumulator_dtype"]) == (_CHIP, "float32")
        and row["rounding"] == "nearest"
        and row["rank"] in (None, _RANK)
        # Sketches are taken of embeddings as well.
        and (row["embeddings"] or row["method"] != "sketched_accumulation")
    }
    if not found.keys() >= set(itertools.product(_MODELS, _METHODS)):
        return
    title = (
        f"Full-rank training fits where LoRA's does: GiB on one {_CHIP}, rank {_RANK}"
    )
    with plots.picture(path, (9, 2.9), (1, len(_MODELS)), title, sharey=True) as panels:
        for axes, model in zip(panels[0], _MODELS, strict=True):
            _parts_of(axes, [found[model, method] for method in _METHODS])
            row = found[model, "lora_accumulation"]
            case = f"{model}, {row['dtype']}, {_tokens(row)} tokens"
            axes.set_title(case, fontsize=9)
            axes.set_xlabel(f"GiB; dotted: {_LIMIT}, the chip's", fontsize=8)
            axes.axvline(_LIMIT, color="black", linestyle=":")
        panels[0, 0].invert_yaxis()  # Shared, and inverted by each of them.
        plots.legend_below(panels[0, 0], columns=5)


def _parts_of(axes: Any, rows: list[Row]) -> None:
    names = ("parameters", "state", "gradients", "activations", "temporaries")
    gib = {name: np.array([row[name] for row in rows]) / _GIB for name in names}
    rest = np.maximum(gib["temporaries"] - gib["activations"], 0)
    # Not all gradients are in memory at once, where they are used one by one.
    gib["gradients"] = np.minimum(gib["gradients"], rest)
    gib["temporaries"] = rest - gib["gradients"]
    lengths = plots.bars(axes, list(_METHODS.values()), gib)
    totals = [f"{x:.1f}" for x in lengths]
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axes.bar_label(axes.containers[-1], totals, padding=4, fontsize=8, bbox=box)
    axes.set_xlim(0, 1.15 * lengths.max())


def _label(row: Row) -> str:
    return report.ranked(_short(row), row["rank"])


def _bars(axes: Any, names: list[str], by_name: dict[str, Row]) -> None:
    """Draws one panel; nothing where a chip has no row."""
    found = [by_name.get(name, {}) for name in names]
    parts = {
        title: np.array([row.get(part, 0) for row in found]) / _GIB
        for part, title in zip(_PARTS, _TITLES, strict=True)
    }
    plots.bars(axes, names, parts)
    axes.invert_yaxis()  # Panels of one row share the axis, which is inverted once.
    totals = [
        f"{row['total'] / _GIB:.1f}" + " (refused)" * ("refused" in row) if row else ""
        for row in found
    ]
    axes.bar_label(axes.containers[-1], totals, padding=3, fontsize=7)
    axes.tick_params(labelsize=7)
    axes.margins(x=0.35)


if __name__ == "__main__":
    report.main(write)
