"""The whole job: corpus, the runs in turns, and the report."""

import contextlib
import time

from rich.console import Console

from experiments.common import job, processes, records
from experiments.common.display import Display, make_console
from experiments.common.loop import Training
from experiments.common.problem import Data
from experiments.main_job import report
from experiments.main_job.config import Config
from experiments.main_job.prepare import prepare


def run(config: Config) -> list[records.Row]:
    """Runs the main job.

    Returns:
        One row per run that is finished.

    Raises:
        ConfigError: the settings make no sense, or do not fit what lies on disk.
        NonFiniteLossError: a run diverged.
    """
    config.validate()
    started = time.perf_counter()
    console = make_console()
    with console.status("Reading, tokenizing and packing the corpus"):
        data = prepare(config)
    console.print(
        f"Corpus: {len(data.train):,} packed training examples of {data.tokens} "
        f"tokens, ready in {time.perf_counter() - started:.1f} s",
        highlight=False,
    )
    rows = _train(config, data, console)
    if not rows:
        console.print(
            f"Stopped after {config.stop_after} of {config.updates} updates; the same "
            "command without --stop-after continues."
        )
    elif processes.is_first():
        report.write(job.results(config), config.output_dir, console)
        console.print(
            f"Wall time {time.perf_counter() - started:.0f} s. Table, pictures, "
            f"metrics and checkpoints are in {config.output_dir}",
            highlight=False,
        )
    return rows


def _train(config: Config, data: Data, console: Console) -> list[records.Row]:
    """Lets the runs take turns, an update each, so that all see the same machine."""
    with Display(console) as display, contextlib.ExitStack() as stack:
        trainings = []
        for run in job.runs_of(config, data):
            trainings.append(Training(run, data, display))
            stack.callback(trainings[-1].close)
        for number in range(1, (config.stop_after or config.updates) + 1):
            for training in trainings:
                training.advance(number)
    return [job.finish(each, {}) for each in trainings if each.done == config.updates]
