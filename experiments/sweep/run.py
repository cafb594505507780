"""Runs grids of short runs: one JSON line each, interrupted at any moment.

For each cell of a grid every learning rate is run at the first seed, and the best of
them at the other seeds. At the end a table and a picture are written next to the rows.
"""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from rich.progress import Progress

from experiments.common import records
from experiments.common.errors import ConfigError
from experiments.sweep import report
from experiments.sweep.config import Cell, Config, cells, parts, run_id, title
from experiments.sweep.results import best_learning_rate, beyond
from experiments.sweep.tasks import Bench, Sources

_Job = tuple[Cell, dict[str, Any]]  # And its group of the grid.


def run(config: Config) -> None:
    """Runs what is missing of each grid, and reports it.

    Raises:
        ConfigError: a grid makes no sense, or has no cell of the title `only`.
    """
    places = config.data_dir, config.corpus_dir
    for path in config.paths():
        grid = json.loads(path.read_text())
        jobs = _jobs(grid, config.only)  # Errors come before hours of training.
        _sources(json.dumps(grid["settings"]), *places)
        output = config.output_dir / f"{path.stem}.jsonl"
        records.resume_rows(output)
        if not output.with_suffix(".json").exists():
            output.with_suffix(".json").write_text(path.read_text())
        run_one = functools.partial(_run_and_append, output=output, places=places)
        with Progress() as progress:
            bar = progress.add_task("cells", total=len(jobs))
            for finished in _each(run_one, jobs, config.workers):
                progress.update(bar, description=finished, advance=1)
        report.write(output)


def _jobs(grid: dict[str, Any], only: str) -> list[_Job]:
    jobs = [(cell, part) for part in parts(grid) for cell in cells(part)]
    exact = [job for job in jobs if only == title(job[0])]
    jobs = exact or [job for job in jobs if only in title(job[0])]
    if not jobs:
        raise ConfigError(f"`--only` {only!r} is in the title of no cell of the grid")
    return jobs


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


def run_cell(
    cell: Cell, grid: dict[str, Any], sources: Sources, done: dict[str, records.Row]
) -> Iterator[records.Row]:
    """Yields the rows of one cell, those already done included."""
    bench = functools.cache(lambda: Bench(sources.task(cell)))  # If a run is missing.

    def run_one(learning_rate: float, seed: int) -> records.Row:
        varied = {"learning_rate": learning_rate, "seed": seed}
        settings = grid["settings"] | cell | varied
        name = run_id(settings | {"corpus": sources.fingerprint})
        if name in done:
            return done[name]
        step = bench()
        started = time.perf_counter()
        result = step.train(float(learning_rate), seed)
        result["seconds"] = time.perf_counter() - started
        return {"id": name} | settings | result | records.versions()

    first, *others = grid["seeds"]
    tuned, learning_rates = [], list(grid["learning_rates"])
    for learning_rate in learning_rates:
        tuned.append(run_one(learning_rate, first))
        yield tuned[-1]
    if all(row["validation_loss"] is None for row in tuned):
        return  # Every learning rate diverged: the rows say so, other cells go on.
    for _ in range(grid.get("extensions", 0)):
        further = beyond(learning_rates, best_learning_rate(tuned))
        if further is None:
            break
        learning_rates = sorted([*learning_rates, further])
        tuned.append(run_one(further, first))
        yield tuned[-1]
    for seed in others:
        yield run_one(best_learning_rate(tuned), seed)


def _each(
    run_one: Callable[..., None], jobs: list[_Job], workers: int
) -> Iterable[str]:
    """Runs the jobs and yields the title of each one that is done."""
    if workers == 1:
        for job in jobs:
            run_one(*job)
            yield title(job[0])
        return
    context = multiprocessing.get_context("spawn")
    cores = context.Queue()
    for core in sorted(os.sched_getaffinity(0))[:workers]:
        cores.put(core)
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, initializer=_pin, initargs=(cores,)
    ) as pool:
        futures = {pool.submit(run_one, *job): title(job[0]) for job in jobs}
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
                yield futures[future]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _pin(cores: Any) -> None:
    """Gives a worker a core of its own, before its first computation."""
    os.sched_setaffinity(0, {cores.get()})
