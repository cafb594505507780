"""Measures every method and writes table, picture and data."""

import dataclasses

import jax
from rich.progress import Progress

from experiments.common import records
from experiments.main_job.run import versions
from experiments.step_memory import measure, report
from experiments.step_memory.config import RANKED, Config


def run(config: Config) -> None:
    """Compiles the steps of every model, method and rank, and reports their bytes."""
    wanted = [
        (model, method, rank)
        for model in config.model
        for method in config.method
        for rank in (config.ranks() if method in RANKED else (None,))
    ]
    rows = []
    with Progress() as progress:
        bar = progress.add_task("compiling", total=len(wanted))
        for model, method, rank in wanted:
            progress.update(bar, description=f"compiling {model} {method} {rank or ''}")
            rows.append(measure.measure(config, model, method, rank))
            progress.advance(bar)
    folder = config.output_dir
    settings = dataclasses.asdict(config) | {"output_dir": str(folder)}
    content = {
        "config": settings,
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "rows": [dataclasses.asdict(row) for row in rows],
    }
    records.write_json(folder / "memory.json", content)
    text = report.table(config, rows)
    (folder / "memory.md").write_text(text)
    report.draw(rows, folder / "memory.png")
    print(text, end="")
    print(f"Table, picture and data are in {folder}")
