"""The whole job: corpus, the trainings in turns, and the report."""

import contextlib
import dataclasses
import importlib.metadata
import pathlib
import platform
import shutil
import time
from typing import Any

import jax
from rich.console import Console

from experiments.common import checkpoints, processes, records
from experiments.common.display import Display, make_console
from experiments.common.errors import ConfigError
from experiments.data.packing import Data, load
from experiments.main_job import report
from experiments.main_job.config import METHODS, Config
from experiments.main_job.training import MethodTraining

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def run(config: Config) -> list[records.Summary]:
    """Runs the experiment.

    Returns:
        The summaries of the finished trainings.

    Raises:
        ConfigError: the settings make no sense, or do not fit what lies on disk.
        NonFiniteLossError: a training diverged.
    """
    config.validate()
    _prepare_folder(config)
    started = time.perf_counter()
    console = make_console()
    with console.status("Reading, tokenising and packing the corpus"):
        dataset = load(config)
    prepared = time.perf_counter() - started
    console.print(
        f"Corpus: {len(dataset.train):,} packed training examples of "
        f"{config.model.context} tokens, ready in {prepared:.1f} s",
        highlight=False,
    )
    summaries = _train(config, dataset, console)
    if len(summaries) < len(config.methods):
        console.print(
            f"Stopped after {config.stop_after} of {config.updates} updates; the same "
            "command with --resume in place of --stop-after continues.",
        )
        return summaries
    if processes.is_first():
        report.write(summaries, config.output_dir, console)
        seconds = time.perf_counter() - started
        _write_summary(config, summaries, {"prepare": prepared, "total": seconds})
        console.print(
            f"Wall time {seconds:.0f} s. Table, pictures, metrics and checkpoints are "
            f"in {config.output_dir}",
            highlight=False,
        )
    return summaries


def _train(config: Config, dataset: Data, console: Console) -> list[records.Summary]:
    """Lets the trainings take turns, an update each; returns those that finished."""
    stop = config.updates if config.stop_after is None else config.stop_after
    with Display(console) as display, contextlib.ExitStack() as stack:
        trainings = []
        for name in config.methods:
            folder = config.output_dir / name
            training = MethodTraining(name, config, dataset, folder, display)
            stack.callback(training.loop.close)
            trainings.append(training)
        for number in range(1, stop + 1):
            for training in trainings:
                training.loop.advance(number)
        summaries = [training.finish() for training in trainings]
    return [summary for summary in summaries if summary is not None]


def _prepare_folder(config: Config) -> None:
    """Sees to it that no earlier training is overwritten unasked."""
    folder = config.output_dir
    earlier = [name for name in METHODS if (folder / name).exists()]
    if config.resume:
        if not any(_has_checkpoint(folder / name) for name in config.methods):
            raise ConfigError(
                f"`--resume` found no checkpoint in {folder} for "
                f"{', '.join(config.methods)}; start without it"
            )
    elif earlier and not config.overwrite:
        raise ConfigError(
            f"`--output-dir` {folder} already holds {', '.join(earlier)}; give "
            "--resume to continue, --overwrite to start again, or another folder"
        )
    if config.overwrite and processes.is_first():
        for name in earlier:
            shutil.rmtree(folder / name)
    # Nobody writes before all have looked and what was there is gone.
    processes.wait()


def _has_checkpoint(folder: pathlib.Path) -> bool:
    return checkpoints.latest(folder / "checkpoints") is not None


def _write_summary(
    config: Config, summaries: list[records.Summary], seconds: dict[str, float]
) -> None:
    content = {
        "config": _jsonable(dataclasses.asdict(config)),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "wall_seconds": seconds,
        "methods": [summary.as_json() for summary in summaries],
    }
    records.write_json(config.output_dir / "summary.json", content)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return str(value) if isinstance(value, pathlib.Path) else value


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that make the numbers."""
    found = {name: importlib.metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version()} | found
