"""A grid of short trainings, one JSON line each: `python -m experiments.sweep`.

The grid is a file. For each method, rank and further setting in it, every learning rate
is run at the first seed, and the best of them at the other seeds. Methods with rates of
their own stand in groups. A run that stands in the results is not run again: interrupt
it at any moment, and the same command goes on. At the end a table and a picture are
written beside the results.
"""

import concurrent.futures
import functools
import hashlib
import itertools
import json
import multiprocessing
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.progress import Progress

from experiments.claims import report as claims_report
from experiments.claims import resampling as resampling_report
from experiments.common import records
from experiments.common.errors import ConfigError
from experiments.family import report as family_report
from experiments.family.recipes import FAMILY
from experiments.finetune.methods import METHODS
from experiments.main_job.run import versions
from experiments.sweep import report as sweep_report
from experiments.sweep.bench import Bench
from experiments.sweep.tasks import Cell, Sources

_METHODS = {*FAMILY, *METHODS, "adafactor_momentum"}
_REPORTS = {
    "projections": sweep_report,
    "family": family_report,
    "claims": claims_report,
    "resampling": resampling_report,
}


def parts(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the groups of a grid, each with what the whole grid says."""
    if "groups" not in grid:
        return [grid]
    shared = {key: value for key, value in grid.items() if key != "groups"}
    return [shared | group for group in grid["groups"]]


def cells(grid: dict[str, Any]) -> list[Cell]:
    """Returns the combinations of method, projection, rank and so on in a group.

    Methods that keep nothing compressed have neither projection nor rank, and come
    once for each of the other settings.
    """
    found = []
    for method in grid["methods"]:
        if method not in _METHODS:
            raise ConfigError(
                f"`methods` of the grid got {method!r}, which is none of "
                f"{', '.join(sorted(_METHODS))}"
            )
        axes = {"rank": grid.get("ranks"), "options": grid.get("options")}
        if method in FAMILY:
            axes["b2"] = grid.get("b2")
        else:
            axes = {"projection": grid.get("projections")} | axes
        if not _ranked(method):
            axes = {key: axes[key] for key in axes if key in ("options", "b2")}
        axes = {name: values for name, values in axes.items() if values is not None}
        found += [
            {"method": method} | dict(zip(axes, values, strict=True))
            for values in itertools.product(*axes.values())
        ]
    return found


def title(cell: Cell) -> str:
    """Returns a cell in words, for example "flora_adamw rank 16 b2 0.99"."""
    settings = {key: cell[key] for key in cell if key not in ("method", "options")}
    pairs = (settings | cell.get("options", {})).items()
    return " ".join([cell["method"], *(f"{name} {value}" for name, value in pairs)])


def _ranked(method: str) -> bool:
    if method in FAMILY:
        return FAMILY[method].ranked
    return method in METHODS and METHODS[method].ranked


def run_id(settings: dict[str, Any]) -> str:
    """Returns a hash of a run's settings; versions stand in its row."""
    text = json.dumps(settings, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_cell(
    cell: Cell, grid: dict[str, Any], sources: Sources, done: dict[str, records.Row]
) -> Iterator[records.Row]:
    """Yields the rows of one cell, those already done included."""
    bench: list[Bench] = []

    def run(rate: float, seed: int) -> records.Row:
        settings = grid["settings"] | cell | {"learning_rate": rate, "seed": seed}
        name = run_id(settings | {"corpus": sources.fingerprint})
        if name in done:
            return done[name]
        if not bench:
            bench.append(Bench(sources.task(cell)))
        started = time.perf_counter()
        result = bench[0].train(float(rate), seed)
        seconds = time.perf_counter() - started
        return {"id": name} | settings | result | {"seconds": seconds} | versions()

    first, *others = grid["seeds"]
    tuned = []
    rates = list(grid["learning_rates"])
    for rate in rates:
        tuned.append(run(rate, first))
        yield tuned[-1]
    if all(row["validation_loss"] is None for row in tuned):
        return  # Every rate diverged: the rows say so, and the other cells go on.
    for _ in range(grid.get("extensions", 0)):
        further = sweep_report.beyond(rates, sweep_report.best_rate(tuned))
        if further is None:
            break
        rates = sorted([*rates, further])
        tuned.append(run(further, first))
        yield tuned[-1]
    for seed in others:
        yield run(sweep_report.best_rate(tuned), seed)


@functools.lru_cache(maxsize=1)
def _sources(settings: str, *places: Any) -> Sources:
    """The data, once in each process."""
    return Sources(json.loads(settings), *places)


def _run_and_append(
    cell: Cell, part: dict[str, Any], output: pathlib.Path, places: tuple[Any, ...]
) -> None:
    """Runs what is missing of one cell."""
    sources = _sources(json.dumps(part["settings"]), *places)
    done = {row["id"]: row for row in records.read_rows(output)}
    for row in run_cell(cell, part, sources, done):
        if row["id"] not in done:
            records.append_row(output, row)
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            return  # It was killed, and nobody waits for the rest.


def _pin(cores: Any) -> None:
    """Gives a worker a core of its own, before its first computation."""
    os.sched_setaffinity(0, {cores.get()})


def _each(
    run: Callable[..., None], jobs: list[tuple[Cell, dict[str, Any]]], workers: int
) -> Iterable[str]:
    """Runs the jobs and yields the title of each one that is done."""
    titles = [title(cell) for cell, _ in jobs]
    if workers == 1:
        for name, job in zip(titles, jobs, strict=True):
            run(*job)
            yield name
        return
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for _, core in zip(range(workers), sorted(os.sched_getaffinity(0)), strict=False):
        cores.put(core)
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_pin, initargs=(cores,)
    ) as pool:
        futures = {
            pool.submit(run, *job): name for name, job in zip(titles, jobs, strict=True)
        }
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def sweep(
    grid_path: pathlib.Path,
    output: pathlib.Path,
    data_dir: pathlib.Path,
    corpus_dir: pathlib.Path | None = None,
    only: str = "",
    workers: int = 1,
) -> None:
    """Runs a grid and appends to its results.

    Args:
        grid_path: JSON with methods, ranks, learning_rates, seeds, a report, and the
            settings that all runs share: those of `python -m experiments`, or of
            `python -m experiments.finetune` where they name a dataset; or with groups,
            each of which says some of these for itself. Further axes are projections,
            b2 (Adam's decay), and options: settings, or arguments of the optimizer,
            that replace what is shared. With extensions, how often a best rate at an
            end of its grid is followed by the next one outwards.
        output: JSON lines, one per run; a table and a picture go beside it.
        data_dir: where the packed corpus is kept.
        corpus_dir: Python sources in place of the standard library.
        only: runs the cell of this title, or those that have it in their titles.
        workers: how many cells run at a time, each on a core of its own.
    """
    cores = os.cpu_count() or 1
    if not 1 <= workers <= cores:
        raise ConfigError(f"`--workers` must be from 1 to {cores} cores, got {workers}")
    grid = json.loads(grid_path.read_text())
    report = _REPORTS[grid["report"]]  # Before hours of training.
    places = data_dir, corpus_dir
    _sources(json.dumps(grid["settings"]), *places)  # Errors, and files, come here.
    records.resume_rows(output)
    jobs = [(cell, part) for part in parts(grid) for cell in cells(part)]
    exact = [job for job in jobs if only == title(job[0])]
    jobs = exact or [job for job in jobs if only in title(job[0])]
    if not jobs:
        raise ConfigError(f"`--only` {only!r} is in the title of no cell of the grid")
    run = functools.partial(_run_and_append, output=output, places=places)
    with Progress() as progress:
        bar = progress.add_task("cells", total=len(jobs))
        for finished in _each(run, jobs, workers):
            progress.update(bar, description=finished, advance=1)
    found = sweep_report.summarise(records.read_rows(output))
    output.with_suffix(".md").write_text(report.table(found))
    report.draw(found, output.with_suffix(".png"))


def main(
    grid: pathlib.Path,
    output: pathlib.Path,
    data_dir: pathlib.Path = pathlib.Path("runs/data"),
    corpus_dir: pathlib.Path | None = None,
    only: str = "",
    workers: int = 1,
) -> int:
    """Runs a grid of short trainings; finished runs are skipped.

    Args:
        grid: JSON file of the grid, for example experiments/sweeps/projections.json.
        output: JSON-lines file of the results, appended to; a table (.md) and a picture
            (.png) are written beside it.
        data_dir: where the tokenizer and the packed examples are kept.
        corpus_dir: folder of Python sources in place of the standard library.
        only: run the cell that has this title, for example "adamw b2 0.99", or else all
            that have it in their titles; all of the grid if it is empty.
        workers: cells that run at a time, each in a process on a core of its own.
    """
    try:
        sweep(grid, output, data_dir, corpus_dir, only, workers)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
