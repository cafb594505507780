"""What ways of averaging gradients over devices came to: table and picture."""

import pathlib

from experiments.common import plots, report
from experiments.common.records import Row, read_rows

_TITLES = {
    "plain": "gradients",
    "sketch": "sketches",
    "feedback": "sketches, error feedback",
}
_VARIED = ("way", "rank", "learning_rate", "seed", "validation_loss", "curve")
_VARIED += ("bytes_all_reduced",)


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) beside the runs."""
    best = _best(read_rows(path))
    whole = best[0][0]["bytes_all_reduced"]
    columns = {
        "averaged": _title,
        "learning rate": lambda rows: f"{rows[0]['learning_rate']:g}",
        "seeds": len,
        "bytes all-reduced per update": lambda rows: (
            f"{rows[0]['bytes_all_reduced']:,}"
        ),
        "fraction": lambda rows: f"{rows[0]['bytes_all_reduced'] / whole:.3f}",
        "validation loss": lambda rows: report.written(_losses(rows)),
    }
    path.with_suffix(".md").write_text(report.markdown(columns, best))
    _draw(best, path.with_suffix(".png"))


def _title(rows: list[Row]) -> str:
    return report.ranked(_TITLES[rows[0]["way"]], rows[0]["rank"] or None)


def _losses(rows: list[Row]) -> list[float | None]:
    return [row["validation_loss"] for row in rows]


def _best(rows: list[Row]) -> list[list[Row]]:
    """The rows of all seeds of each way, at the learning rate of the lowest mean.

    Rows of other settings than those of the last one are left out.
    """
    shared = {name: x for name, x in rows[-1].items() if name not in _VARIED}
    ways: dict[tuple[str, int], dict[float, list[Row]]] = {}
    for row in rows:
        if shared.items() <= row.items():
            rates = ways.setdefault((row["way"], row["rank"]), {})
            rates.setdefault(row["learning_rate"], []).append(row)
    return [
        min(rates.values(), key=lambda rows: report.mean_and_error(_losses(rows)))
        for rates in ways.values()
    ]


def _draw(best: list[list[Row]], path: pathlib.Path) -> None:
    """Draws the validation loss over the updates: mean and standard error."""
    first = best[0][0]
    ranks = sorted({rows[0]["rank"] for rows in best})
    title = (
        f"What {first['devices']} devices average, each way at its best learning rate; "
        f"{len(best[0])} seeds"
    )
    with plots.picture(path, (7.6, 4.6), title=title) as panels:
        axes = panels[0, 0]
        for rows in best:
            if None in _losses(rows):
                continue  # The table says so.
            share = rows[0]["bytes_all_reduced"] / first["bytes_all_reduced"]
            points = list(zip(*(row["curve"] for row in rows), strict=True))
            plots.points(
                axes,
                [point[0][0] for point in points],
                [[loss for _, loss in point] for point in points],
                list(_TITLES).index(rows[0]["way"]),
                linestyle=plots.DASHES[ranks.index(rows[0]["rank"]) % 4],
                markersize=4,
                label=f"{_title(rows)}: {share:.0%} of the bytes",
            )
        axes.set_xlabel("update")
        axes.set_ylabel(plots.LOSS)
        axes.legend(frameon=False, fontsize=9)


if __name__ == "__main__":
    report.main(write)
