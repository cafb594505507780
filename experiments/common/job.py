"""The runs of one job, and what is left of them."""

import json
import shutil
from typing import Any

import jax

from experiments.common import devices, processes, records, state_bytes
from experiments.common.config import JobConfig, Run
from experiments.common.loop import Training
from experiments.common.methods import METHODS, settings_of
from experiments.common.problem import Data


def runs_of(config: JobConfig, data: Data) -> list[Run]:
    """Returns the runs that are asked for; `overwrite` has removed what they left.

    Raises:
        ConfigError: a rank would compress nothing, which would be the uncompressed
            method. All are looked at before the first hours are spent.
    """
    runs = [
        Run(config, name, rank)
        for name in config.methods
        for rank in (config.ranks if METHODS[name].ranked else (None,))
    ]
    for run in runs:
        if run.method.compressed:
            state_bytes.leaf_plans(data.params, settings_of(config, run.rank).sketch)
    if config.overwrite and processes.is_first():
        for run in runs:
            shutil.rmtree(run.folder, ignore_errors=True)
    # Nobody writes before what was there is gone.
    processes.wait()
    return runs


def finish(training: Training, scores: dict[str, float]) -> records.Row:
    """Returns what tables say of a finished run; `result.json` keeps it."""
    run, rows = training.run, training.metrics.rows
    seconds = records.median_seconds(rows)
    row = {
        "run": run.folder.name,
        "method": run.name,
        "title": run.title,
        "rank": run.rank,
        "learning_rate": run.config.peak(run.name),
        "updates": run.config.updates,
        "tokens_per_update": training.problem.tokens,
        **training.sizes,
        "step_peak_bytes": training.step_bytes,
        "step_seconds": seconds,
        "tokens_per_second": training.problem.tokens / seconds,
        "train_loss": records.final_train_loss(rows),
        "validation_loss": rows[-1]["validation_loss"],
        "perplexity": rows[-1]["perplexity"],
        **scores,
    }
    if processes.is_first():
        records.write_json(run.folder / "result.json", row)
    return row


def results(config: JobConfig) -> list[records.Row]:
    """Returns the rows of all finished runs in the output directory.

    `results.json` keeps them, together with what made them.
    """
    files = config.output_dir.glob("*/result.json")
    order = list(METHODS)
    rows = sorted(
        (json.loads(file.read_text()) for file in files),
        key=lambda row: (order.index(row["method"]), row["rank"] or 0),
    )
    content: dict[str, Any] = records.provenance(config) | {
        "devices": jax.device_count(),
        "peak_bytes": devices.peak_bytes(),
        "rows": rows,
    }
    records.write_json(config.output_dir / "results.json", content)
    return rows
