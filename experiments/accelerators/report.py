"""Table and picture of optimizer steps on one chip."""

import pathlib

from experiments.common import plots, report
from experiments.common.methods import METHODS
from experiments.common.records import Row, read_rows

_CASE = ("problem", "dtype", "rank", "chip")
_CAPTION = """\
One update and its application, compiled for one chip, parameters and state donated.
Sizes are multiples of the parameters: state, temporaries, what the kernels read and
write in the chip's memory in every step, and what some steps move besides (a refresh, a
transfer, the end of a cycle of accumulation). By `fj.update_and_apply`; "two calls" are
`tx.update` and `optax.apply_updates`. The lower bound on the time of every step
sums over kernels the longer of memory and products, at published rates. Nothing was
executed, and the GPU's kernels are not autotuned.
"""


def write(path: pathlib.Path) -> None:
    """Writes table (.md) and picture (.png) beside the rows."""
    rows = read_rows(path)
    text = _CAPTION
    for case, group in report.grouped(rows, *_CASE).items():
        seconds = {row["method"]: row["seconds"] for row in group}
        adamw = seconds.get("adamw")
        columns = {
            "optimizer": _title,
            "state": lambda row: _times(row, row["arguments"] - 2 * row["parameters"]),
            "moved in a step": lambda row: _times(row, row["step"]),
            "besides in some": lambda row: _times(row, row["besides"]),
            "temporaries": lambda row: _times(row, row["temporaries"], 3),
            "products, GFLOP": lambda row: report.products(row["flops"]),
            "time bound, ms": lambda row: f"{1e3 * row['seconds']:.2f}",
            "of AdamW's": lambda row, adamw=adamw: (
                adamw and f"{row['seconds'] / adamw:.2f}"
            ),
            "compilation, processor s": lambda row: f"{row['compilation']:.0f}",
        }
        problem, dtype, rank, chip = case
        text += f"\n## {problem} in {dtype}, rank {rank}, {chip}\n\n"
        text += report.markdown(columns, group)
    path.with_suffix(".md").write_text(text)
    _draw(path.with_suffix(".png"), rows)


def _title(row: Row) -> str:
    title = METHODS[row["method"]].title
    return title if row["calls"] == "one" else f"{title}, two calls"


def _times(row: Row, size: float, digits: int = 2) -> str:
    return f"{size / row['parameters']:.{digits}f}"


def _draw(path: pathlib.Path, rows: list[Row]) -> None:
    """Dots: what each optimizer moves in a step and holds besides, on each chip."""
    rows = [
        row for row in rows if (row["problem"], row["dtype"]) == ("leaf", "float32")
    ]
    names = list(dict.fromkeys(map(_title, rows)))
    what = {"step": "moved in a step", "temporaries": "temporaries"}
    with plots.picture(
        path,
        (8, 0.8 + 0.28 * len(names)),
        (1, 2),
        "Bytes of a step on a 4096 x 11008 matrix, over the parameters'; line: AdamW",
        sharey=True,
    ) as panels:
        for axes, (field, title) in zip(panels[0], what.items(), strict=True):
            for number, (chip, group) in enumerate(
                report.grouped(rows, "chip").items()
            ):
                x = [row[field] / row["parameters"] for row in group]
                y = [names.index(_title(row)) for row in group]
                style = plots.look(number) | {"linestyle": "none", "mfc": "none"}
                axes.plot(x, y, **style, label=" ".join(chip))
            axes.set_xlabel(title, fontsize=9)
        panels[0, 0].axvline(7, color=plots.GREY, zorder=0)  # AdamW's.
        panels[0, 0].set_yticks(range(len(names)), names, fontsize=8)
        panels[0, 0].invert_yaxis()
        panels[0, 1].legend(fontsize=8)


if __name__ == "__main__":
    report.main(write)
