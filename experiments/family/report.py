"""Loss versus the bytes of the optimizer's state: a table and the Pareto front."""

import pathlib
from collections.abc import Sequence

from experiments.common import plots, report
from experiments.common.report import megabytes
from experiments.sweep.results import Result, finished, read


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) next to the runs."""
    results = read(path)
    path.with_suffix(".md").write_text(table(results))
    draw(results, path.with_suffix(".png"))


def table(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table, the lowest loss first.

    "Over AdamW" is the mean, with its standard error, of the differences at the same
    seed, which shares initial parameters and the order of the data.
    """
    adamws = [r for r in results if r.title == "AdamW"]
    reference = min(adamws, key=lambda result: result.mean, default=None)
    columns = {
        "optimizer": lambda r: r.title,
        "rank": lambda r: r.rank,
        "b2": lambda r: r.settings.get("b2"),
        "learning rate": lambda r: f"{r.learning_rate:g}",
        "validation loss": lambda r: report.written(r.values()),
        "over AdamW": lambda r: difference(r, reference),
        "state of matrices, MB": lambda r: megabytes(r.of_first("matrix_bytes")),
        "of AdamW's": lambda r: _share(r, reference),
        "whole state, MB": lambda r: megabytes(r.of_first("state_bytes")),
        "ms/update": lambda r: f"{1000 * r.step_seconds:.0f}",
    }
    return report.markdown(columns, sorted(results, key=lambda result: result.mean))


def difference(result: Result, reference: Result | None) -> str:
    """Returns the mean difference of the losses at equal seeds, if there are any."""
    if reference is None:
        return ""
    other = {row["seed"]: row["validation_loss"] for row in reference.rows}
    pairs = [
        row["validation_loss"] - other[row["seed"]]
        for row in result.rows
        if None not in (other.get(row["seed"]), row["validation_loss"])
    ]
    complete = pairs and None not in result.values()
    return report.written(pairs, sign="+") if complete else ""


def _share(result: Result, reference: Result | None) -> str:
    if reference is None:
        return ""
    share = result.of_first("matrix_bytes") / reference.of_first("matrix_bytes")
    return f"{share:.3f}"


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
    """Draws loss over the bytes of the matrices' state; dots join the ranks.

    The step line is the Pareto front: the lowest loss at so many bytes or fewer.
    """
    results = finished(results)
    groups: dict[str, list[Result]] = {}
    for result in results:
        b2 = result.settings.get("b2")
        others = {r.settings.get("b2") for r in results if r.title == result.title}
        suffix = f", b2 {b2}" if len(others) > 1 else ""
        groups.setdefault(result.title + suffix, []).append(result)
    with plots.picture(path, (10, 5.6), title=plots.SEEDS) as panels:
        axes = panels[0, 0]
        for number, (name, mine) in enumerate(groups.items()):
            mine.sort(key=_megabytes)
            values = [result.values() for result in mine]
            plots.points(axes, list(map(_megabytes, mine)), values, number, label=name)
        best = front(results)
        if best:
            most = max(map(_megabytes, results))
            x, y = [*map(_megabytes, best), most], [r.mean for r in (*best, best[-1])]
            look = {"color": "black", "alpha": 0.35, "linewidth": 1}
            axes.step(x, y, where="post", label="Pareto front", **look)
            decades = [x * 10.0**k for k in range(-3, 4) for x in (1, 2, 5)]
            limits = min(map(_megabytes, best)) / 1.5, 1.5 * most
            plots.log_ticks(axes, [x for x in decades if limits[0] < x < limits[1]])
            axes.set_xlim(limits)
            axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        axes.set_xlabel("optimizer state of the matrices, MB (logarithmic)")
        axes.set_ylabel(plots.LOSS)


def _megabytes(result: Result) -> float:
    return result.of_first("matrix_bytes") / 1e6


def front(results: Sequence[Result]) -> list[Result]:
    """Returns the results below which nothing with as few bytes lies, by bytes."""
    best: list[Result] = []
    for result in sorted(results, key=lambda r: (_megabytes(r), r.mean)):
        if not best or result.mean < best[-1].mean:
            best.append(result)
    return best


if __name__ == "__main__":
    report.main(write)
