"""All runs of one command, one after the other, and their table."""

import jax
from rich.console import Console

from experiments.common import display, loop, processes
from experiments.common.records import Row
from experiments.common.report import markdown
from experiments.finetune.config import Config
from experiments.finetune.evaluate import evaluate
from experiments.finetune.prepare import Prepared, prepare
from experiments.models.hugging_face import save


def run(config: Config, prepared: Prepared | None = None) -> list[Row]:
    """Trains and evaluates every method at every rank.

    Args:
        config: the settings.
        prepared: what `prepare` makes of them, if it is there already.

    Returns:
        One row per run that is finished.

    Raises:
        ConfigError: the settings do not fit the data, or what lies on disk.
        NonFiniteLossError: a run diverged.
    """
    console = display.make_console()
    if prepared is None:
        with console.status("Preparing data, vocabulary and model"):
            prepared = prepare(config)
    sizes = {split: len(pairs) for split, pairs in prepared.splits.items()}
    counts = ", ".join(f"{count:,} {split}" for split, count in sizes.items())
    console.print(
        f"{prepared.dataset.description} Pairs: {counts}. Vocabulary: "
        f"{prepared.vocabulary.size:,} tokens. Model: "
        f"{sum(x.size for x in jax.tree.leaves(prepared.params)):,} parameters.",
    )
    rows = []
    for each in loop.runs_of(config, prepared):
        (training,) = loop.train([each], prepared, console)
        if training.done < config.updates:
            console.print(f"{each.title}: stopped after update {training.done}")
        else:
            rows.append(_finish(training, prepared, console))
    if processes.is_first():
        _report(config, prepared, console)
    return rows


def _finish(training: loop.Training, prepared: Prepared, console: Console) -> Row:
    """Evaluates a finished run; writes its model, result and samples."""
    folder = training.run.folder
    params = training.problem.merged(training.state.params, training.frozen)
    if processes.is_first():  # Before the evaluation, which may fail.
        save(params, prepared.model, folder / "model")
        prepared.vocabulary.save(folder / "model")
    scores, samples = evaluate(training.run.config, prepared, params)
    text = "\n\n".join(
        f"source:     {pair.source}\nreference:  {pair.target}\nprediction: {found}"
        for pair, found in samples
    )
    if processes.is_first():
        (folder / "samples.txt").write_text(text + "\n")
        console.print(text, markup=False)
    return training.result(scores)


def _report(config: Config, prepared: Prepared, console: Console) -> None:
    """Prints the table of all finished runs, and writes it."""
    rows = loop.results(config)
    if not rows:
        return
    columns = {
        "method": lambda row: row["title"],
        "trained (bytes)": lambda row: f"{row['trained_bytes']:,}",
        "state (bytes)": lambda row: f"{row['state_bytes']:,}",
        "s/update": lambda row: f"{row['step_seconds']:.2f}",
    }
    others = [f"{name}_loss" for name in config.eval_datasets]
    for name in ("validation_loss", "perplexity", *prepared.dataset.metrics, *others):
        columns[name] = lambda row, name=name: f"{row[name]:.3f}"
    display.table(console, columns, rows)
    (config.output_dir / "report.md").write_text(markdown(columns, rows))
