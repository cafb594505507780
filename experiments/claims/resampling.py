"""Loss over the interval between two projections of the momentum."""

import math
import pathlib

from experiments.claims.report import table
from experiments.common import plots, report
from experiments.sweep.results import finished, read


def stability_limit(decay: float, rank: int, width: int) -> float:
    """Returns the interval κ at which decay^(2κ)·width/rank is 1.

    Each transfer multiplies the expected square of the momentum by width/rank, and
    between two of them it decays: with fewer updates in between it grows without bound.
    """
    return math.log(width / rank) / (2 * math.log(1 / decay))


def write(path: pathlib.Path) -> None:
    """Writes the table (.md) and the picture (.png) next to the runs.

    The picture has "never" at the right, and the stability limit. All runs are of one
    rank, whose limit it is.
    """
    path.with_suffix(".md").write_text(table(read(path)))
    results = finished(read(path))
    found = {r.of_first("options")["resample_every"] or math.inf: r for r in results}
    if not found:
        return  # The table says so.
    row = next(iter(found.values())).rows[0]
    every = sorted(found)
    never = 10 * max(x for x in (1, *every) if x < math.inf)
    places = [min(x, never) for x in every]
    limit = stability_limit(row["momentum"], row["rank"], row["model"]["width"])
    with plots.picture(path.with_suffix(".png"), title=plots.SEEDS) as panels:
        axes = panels[0, 0]
        values = [found[x].values() for x in every]
        plots.points(axes, places, values, 0, label=f"FLORA, r={row['rank']}")
        axes.axvline(limit, color=plots.PALETTE[1], linestyle="--")
        axes.axvspan(0.5, limit, color=plots.PALETTE[1], alpha=0.12)
        text = f"the momentum grows\nwithout bound\nbelow {limit:.1f}"
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        look = {"xytext": (-4, 0), "ha": "right", "va": "top", "fontsize": 9}
        axes.annotate(text, (limit, 0.98), **place, **look)
        labels = ["never" if x == math.inf else x for x in every]
        plots.log_ticks(axes, places, labels)
        axes.set_xlim(0.5, 2 * max(places))
        axes.set_xlabel("updates between two projections")
        axes.set_ylabel(plots.LOSS)
        axes.legend(frameon=False)


if __name__ == "__main__":
    report.main(write)
