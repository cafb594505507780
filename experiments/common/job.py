"""The runs of one job: their folders, their starts, and what is left of them."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax

from experiments.common import devices, processes, records, state_bytes
from experiments.common.config import JobConfig
from experiments.common.display import Display
from experiments.common.loop import Training
from experiments.common.methods import METHODS, Method, settings_of
from experiments.common.problem import Data, build, learning_rate


@dataclasses.dataclass(frozen=True)
class Run:
    """A method, at a rank if it has one."""

    config: JobConfig
    name: str
    rank: int | None

    @property
    def method(self) -> Method:
        """The method."""
        return METHODS[self.name]

    @property
    def title(self) -> str:
        """Its name on the screen and in tables."""
        rank = "" if self.rank is None else f", r={self.rank}"
        return self.method.title + rank

    @property
    def folder(self) -> pathlib.Path:
        """Where its metrics and checkpoints are kept."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        return self.config.output_dir / (self.name + rank)

    def start(self, data: Data, display: Display) -> Training:
        """Starts the run, or takes it up again from its last checkpoint.

        Raises:
            ConfigError: nothing would be compressed, or the checkpoint was made with
                other settings.
        """
        config = self.config
        problem, state, tx = build(config, data, self.name, self.rank)
        return Training(
            self.title,
            problem,
            state,
            tx,
            config,
            micro_batches=self.method.micro_batches(config),
            schedule=learning_rate(config, self.name),
            sizes=state_bytes.measure(
                self.method, settings_of(config, self.rank).sketch, *state
            ),
            folder=self.folder,
            identity=config.identity(self.name, self.rank)
            | {"the data": data.fingerprint},
            rate_flag=f"--{'lora-' * self.method.adapters}learning-rate",
            display=display,
        )

    def finish(self, training: Training, scores: dict[str, float]) -> records.Row:
        """Returns what tables say of a finished run; `result.json` keeps it."""
        config, rows = self.config, training.metrics.rows
        seconds = records.median_seconds(rows)
        row = {
            "run": self.folder.name,
            "method": self.name,
            "title": self.title,
            "rank": self.rank,
            "learning_rate": config.peak(self.name),
            "updates": config.updates,
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
            records.write_json(self.folder / "result.json", row)
        return row


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


def results(config: JobConfig) -> list[records.Row]:
    """Returns the rows of all finished runs in the output directory; keeps them.

    Together with all that made them, in `results.json`.
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
