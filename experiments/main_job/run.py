"""The whole job: corpus, the runs in turns, and the report."""

import time

import jax

from experiments.common import display, loop, processes, records
from experiments.common.problem import Data
from experiments.data import batches, packing
from experiments.main_job import report
from experiments.main_job.config import Config
from experiments.models.build import create


def prepare(config: Config) -> Data:
    """Makes or loads all that the runs have in common.

    Raises:
        ConfigError: the corpus is too small, or the processes of this job have
            different ones.
    """
    model, places = config.model, (config.corpus_dir, config.data_dir)
    sizes = {"vocab_size": model.vocab_size, "context": model.context}
    with processes.first_goes_first():
        packed = packing.load(*places, **sizes)
    processes.check_same("the corpus", packed.fingerprint)
    graphdef, params = create(model, config.seed)
    return Data(
        model=model,
        graphdef=graphdef,
        params=jax.device_get(params),
        train=packed.train,
        validation=batches.spread(packed.validation, config.eval_examples),
        tokens=model.context,
        fingerprint=packed.fingerprint,
    )


def run(config: Config) -> list[records.Row]:
    """Runs the main job.

    Returns:
        One row per run that is finished.

    Raises:
        ConfigError: the settings do not fit the corpus, or what lies on disk.
        NonFiniteLossError: a run diverged.
    """
    started = time.perf_counter()
    console = display.make_console()
    with console.status("Reading, tokenizing and packing the corpus"):
        data = prepare(config)
    console.print(
        f"Corpus: {len(data.train):,} packed training examples of {data.tokens} "
        f"tokens, ready in {time.perf_counter() - started:.1f} s",
    )
    trained = loop.train(loop.runs_of(config, data), data, console)
    rows = [each.result() for each in trained if each.done == config.updates]
    if not rows:
        console.print(
            f"Stopped after {config.stop_after} of {config.updates} updates; the same "
            "command without --stop-after continues."
        )
    elif processes.is_first():
        report.write(loop.results(config), config.output_dir, console)
        console.print(
            f"Wall time {time.perf_counter() - started:.0f} s. Table, pictures, "
            f"metrics and checkpoints are in {config.output_dir}",
        )
    return rows
