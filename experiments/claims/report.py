"""Metrics and memory of each method: a table, and a panel of dots for each metric."""

import pathlib
from collections.abc import Iterable, Sequence

from experiments.common import plots, report
from experiments.common.report import megabytes
from experiments.data.registry import DATASETS
from experiments.sweep.results import Result, finished, read

_METRICS = {
    "validation_loss": plots.LOSS,
    "rouge1": "ROUGE-1",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "chrf": "chrF",
    "exact_match": "exact match (%)",
    **{f"{name}_loss": f"loss on {name}" for name in DATASETS},
}
# Of the change of pretrained weights, means over the matrices; in the table alone.
_CHANGES = {
    "effective_rank": ("effective rank", 1),
    "intruders": ("intruder dimensions", 2),
    "relative_change": ("relative change", 4),
}


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) next to the runs."""
    results = read(path)
    path.with_suffix(".md").write_text(table(results))
    draw(results, path.with_suffix(".png"))


def _measured(results: Sequence[Result], names: Iterable[str]) -> list[str]:
    return [name for name in names if all(name in r.rows[0] for r in results)]


def table(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table, the lowest loss first."""
    columns = {
        "method": lambda r: r.ranked_title,
        "learning rate": lambda r: f"{r.learning_rate:g}",
    }
    for name in _measured(results, _METRICS):
        digits = 3 if name.endswith("_loss") else 1
        columns[_METRICS[name].split(" (")[0]] = lambda r, name=name, digits=digits: (
            report.written(r.values(name), digits)
        )
    for name in _measured(results, _CHANGES):
        title, digits = _CHANGES[name]
        columns[title] = lambda r, name=name, digits=digits: report.written(
            r.values(name), digits
        )
    for name in ("trained", "state", "step"):
        columns[f"{name}, MB"] = lambda r, name=name: megabytes(
            r.of_first(f"{name}_bytes")
        )
    return report.markdown(columns, sorted(results, key=lambda result: result.mean))


def draw(results: Sequence[Result], path: pathlib.Path) -> None:
    """Draws a panel per metric, with a row per method; bars are standard errors."""
    results = finished(results)
    if not results:
        return  # The table says so.
    names = _measured(results, _METRICS)
    titles = [result.ranked_title for result in results]
    longest = 0.085 * max(map(len, titles))  # Inches.
    size = longest + 3.2 * len(names), 1.2 + 0.28 * len(titles)
    shape = 1, len(names)
    with plots.picture(path, size, shape, plots.SEEDS, sharey=True) as panels:
        for axes, name in zip(panels[0], names, strict=True):
            for place, result in enumerate(results):
                mean, error = report.mean_and_error(result.values(name))
                number = 0 if result.method.compressed else 1 + result.method.adapters
                axes.errorbar(mean, place, xerr=error, capsize=3, **plots.look(number))
            axes.set_xlabel(_METRICS[name])
        panels[0, 0].set_yticks(range(len(titles)), titles)
        panels[0, 0].invert_yaxis()


if __name__ == "__main__":
    report.main(write)
