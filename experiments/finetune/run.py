"""All runs of one command, one after the other, and their table."""

import contextlib
import pathlib

import jax
from rich.console import Console

from experiments.common import display, job, lora, processes, records
from experiments.common.config import Run
from experiments.common.loop import Training
from experiments.common.report import markdown
from experiments.finetune.config import Config
from experiments.finetune.evaluate import Sample, evaluate
from experiments.finetune.prepare import Prepared, prepare
from experiments.models.hugging_face import save


def run(config: Config, prepared: Prepared | None = None) -> list[records.Row]:
    """Trains and evaluates every method at every rank.

    Args:
        config: the settings.
        prepared: what `prepare` makes of them, if it is there already.

    Returns:
        One row per run that is finished.

    Raises:
        ConfigError: the settings make no sense, or do not fit what lies on disk.
        NonFiniteLossError: a run diverged.
    """
    console = display.make_console()
    if prepared is None:
        with console.status("Preparing data, vocabulary and model"):
            prepared = prepare(config)
    _describe(prepared, console)
    rows = [_train(each, prepared, console) for each in job.runs_of(config, prepared)]
    if processes.is_first():
        _report(config, prepared, console)
    return [row for row in rows if row is not None]


def _describe(prepared: Prepared, console: Console) -> None:
    counts = ", ".join(
        f"{len(pairs):,} {split}" for split, pairs in prepared.splits.items()
    )
    console.print(
        f"{prepared.dataset.description} Pairs: {counts}. Vocabulary: "
        f"{prepared.vocabulary.size:,} tokens. Model: "
        f"{sum(x.size for x in jax.tree.leaves(prepared.params)):,} parameters.",
        highlight=False,
    )


def _train(this: Run, prepared: Prepared, console: Console) -> records.Row | None:
    """One run and its evaluation; None if it has updates to come."""
    config = this.config
    with display.Display(console) as shown, contextlib.ExitStack() as stack:
        training = Training(this, prepared, shown)
        stack.callback(training.close)
        for number in range(1, (config.stop_after or config.updates) + 1):
            training.advance(number)
    if training.done < config.updates:
        console.print(f"{this.title}: stopped after update {training.done}")
        return None
    return _finish(training, prepared, console)


def _finish(training: Training, prepared: Prepared, console: Console) -> records.Row:
    """Evaluates a finished run; writes its model, result and samples."""
    this = training.run
    params = lora.join(training.state.params, training.frozen)
    if this.method.adapters:
        params = lora.merge(params, this.rank, this.config.alpha(this.rank))
    if processes.is_first():  # Before the evaluation, which may fail.
        save(params, prepared.model, this.folder / "model")
        prepared.vocabulary.save(this.folder / "model")
    scores, samples = evaluate(this.config, prepared, params)
    if processes.is_first():
        _show_samples(samples, this.folder / "samples.txt", console)
    return job.finish(training, scores)


def _show_samples(samples: list[Sample], path: pathlib.Path, console: Console) -> None:
    text = "\n\n".join(
        f"source:     {sample.source}\nreference:  {sample.reference}\n"
        f"prediction: {sample.prediction}"
        for sample in samples
    )
    path.write_text(text + "\n")
    console.print(text, highlight=False, markup=False)


def _report(config: Config, prepared: Prepared, console: Console) -> None:
    """Prints the table of all finished runs, and writes it."""
    rows = job.results(config)
    if not rows:
        return
    columns = {
        "method": lambda row: row["title"],
        "trained (bytes)": lambda row: f"{row['trained_bytes']:,}",
        "state (bytes)": lambda row: f"{row['state_bytes']:,}",
        "s/update": lambda row: f"{row['step_seconds']:.2f}",
    }
    for name in ("validation_loss", "perplexity", *prepared.dataset.metrics):
        columns[name] = lambda row, name=name: f"{row[name]:.3f}"
    display.table(console, columns, rows)
    (config.output_dir / "report.md").write_text(markdown(columns, rows))
