"""What ways of averaging gradients over devices came to: table and picture."""

import pathlib

import numpy as np

from experiments.common import plots, report
from experiments.common.records import Row, read_rows

_TITLES = {
    "plain": "gradients",
    "sketch": "sketches",
    "feedback": "sketches, error feedback",
}
_VARIED = ("way", "rank", "learning_rate", "seed")
_VARIED += ("validation_loss", "curve", "bytes_all_reduced")


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) next to the runs."""
    best = _best(read_rows(path))
    uncompressed = _bytes(best[0])
    columns = {
        "averaged": _title,
        "learning rate": lambda rows: f"{rows[0]['learning_rate']:g}",
        "seeds": len,
        "bytes all-reduced per update": lambda rows: f"{_bytes(rows):,}",
        "fraction": lambda rows: f"{_bytes(rows) / uncompressed:.3f}",
        "validation loss": lambda rows: report.written(_losses(rows)),
    }
    path.with_suffix(".md").write_text(report.markdown(columns, best))
    _draw(best, path.with_suffix(".png"))


def _title(rows: list[Row]) -> str:
    return report.ranked(_TITLES[rows[0]["way"]], rows[0]["rank"] or None)


def _bytes(rows: list[Row]) -> int:
    return rows[0]["bytes_all_reduced"]


def _losses(rows: list[Row]) -> list[float | None]:
    return [row["validation_loss"] for row in rows]


def _best(rows: list[Row]) -> list[list[Row]]:
    """The rows of all seeds of each way, at the learning rate of the lowest mean.

    Rows of other settings than those of the last one are left out.
    """
    shared = {name: x for name, x in rows[-1].items() if name not in _VARIED}
    rows = [row for row in rows if shared.items() <= row.items()]
    best = []
    for mine in report.grouped(rows, "way", "rank").values():
        runs = report.grouped(mine, "learning_rate").values()
        best.append(min(runs, key=lambda x: report.mean_and_error(_losses(x))))
    return best


def _draw(best: list[list[Row]], path: pathlib.Path) -> None:
    """Draws the validation loss over the updates: mean and standard error."""
    ranks = sorted({rows[0]["rank"] for rows in best})
    title = f"What {best[0][0]['devices']} devices average, each way at its best "
    title += f"learning rate; {len(best[0])} seeds"
    with plots.picture(path, (7.6, 4.6), title=title) as panels:
        axes = panels[0, 0]
        for rows in best:
            if None in _losses(rows):
                continue  # The table says so.
            curves = np.array([row["curve"] for row in rows])
            number = list(_TITLES).index(rows[0]["way"])
            dash = plots.DASHES[ranks.index(rows[0]["rank"]) % 4]
            share = _bytes(rows) / _bytes(best[0])
            label = f"{_title(rows)}: {share:.0%} of the bytes"
            look = {"linestyle": dash, "markersize": 4, "label": label}
            updates, losses = curves[0, :, 0], curves[..., 1].T.tolist()
            plots.points(axes, updates, losses, number, **look)
        axes.set(xlabel="update", ylabel=plots.LOSS)
        axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    report.main(write)
