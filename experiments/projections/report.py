"""Loss by projection and rank: a table, and a panel for momentum and accumulation."""

import pathlib

from experiments.common import plots, report
from experiments.sweep.results import Result, finished, read


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) next to the runs."""
    results = read(path)
    columns = {
        "method": lambda r: r.method.title,
        "projection": lambda r: r.settings.get("projection"),
        "rank": lambda r: r.rank,
        "learning rate": lambda r: f"{r.learning_rate:g}",
        "validation loss": lambda r: report.written(r.values()),
        "ms/update": lambda r: f"{1000 * r.step_seconds:.0f}",
    }
    path.with_suffix(".md").write_text(report.markdown(columns, results))
    results = finished(results)
    kinds = sorted({result.method.kind for result in results}, reverse=True)
    if not kinds:
        return  # The table says that everything diverged.
    size = 4.8 * len(kinds) + 0.4, 4.2
    image, shape = path.with_suffix(".png"), (1, len(kinds))
    with plots.picture(image, size, shape, plots.SEEDS, sharey=True) as panels:
        for axes, kind in zip(panels[0], kinds, strict=True):
            _panel(axes, [result for result in results if result.method.kind == kind])
            axes.set_title(kind, fontsize=11)
        panels[0, 0].set_ylabel(plots.LOSS)


def _panel(axes: plots.Axes, results: list[Result]) -> None:
    for result in results:
        if result.rank is None:
            mean, error = report.mean_and_error(result.values())
            axes.axhline(mean, color="black", linestyle="--", label="uncompressed")
            axes.axhspan(mean - error, mean + error, color="black", alpha=0.1)
    sketched = [result for result in results if result.rank is not None]
    ranks = sorted({result.rank for result in sketched})
    names = sorted({result.settings["projection"] for result in sketched})
    for number, name in enumerate(names):
        mine = [x for x in sketched if x.settings["projection"] == name]
        shift = 0.12 * (number - len(names) / 2)
        places = [ranks.index(result.rank) + shift for result in mine]
        values = [result.values() for result in mine]
        plots.points(axes, places, values, number, label=name, linestyle="none")
    axes.set_xticks(range(len(ranks)), ranks)
    axes.set(xlim=(-0.6, max(len(ranks), 1) - 0.4), xlabel="rank")
    axes.legend(frameon=False, fontsize=8)


if __name__ == "__main__":
    report.main(write)
