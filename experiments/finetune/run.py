"""All trainings of one command, one after the other, and their table."""

import contextlib
import dataclasses
import pathlib
import shutil

import jax
from rich import box
from rich.console import Console
from rich.table import Table

import flora_jax as fj
from experiments import devices, loop, records
from experiments.config import flag
from experiments.display import Display, make_console
from experiments.finetune import methods, problem
from experiments.finetune.config import Config
from experiments.finetune.evaluate import Sample, evaluate
from experiments.finetune.methods import METHODS
from experiments.finetune.prepare import Prepared, prepare
from experiments.run import versions
from experiments.state_bytes import tree_bytes


def run(config: Config) -> list[records.Row]:
    """Trains and evaluates every method at every rank.

    Returns:
        One row per training that is finished.

    Raises:
        ConfigError: the settings make no sense, or do not fit what lies on disk.
        NonFiniteLossError: a training diverged.
    """
    console = make_console()
    if config.overwrite and config.output_dir.exists():
        shutil.rmtree(config.output_dir)
    with console.status("Preparing data, vocabulary and model"):
        prepared = prepare(config)
    _describe(config, prepared, console)
    rows = []
    for name in config.methods:
        for rank in config.ranks if METHODS[name].ranked else (None,):
            row = _train(config, prepared, name, rank, console)
            if row is not None:
                rows.append(row)
    _report(config, rows, console)
    return rows


def _describe(config: Config, prepared: Prepared, console: Console) -> None:
    counts = ", ".join(
        f"{len(pairs):,} {split}" for split, pairs in prepared.splits.items()
    )
    console.print(
        f"{prepared.dataset.description} Pairs: {counts}. Vocabulary: "
        f"{prepared.vocabulary.size:,} tokens. Model: "
        f"{sum(x.size for x in jax.tree.leaves(prepared.params)):,} parameters.",
        highlight=False,
    )


def _train(
    config: Config, prepared: Prepared, name: str, rank: int | None, console: Console
) -> records.Row | None:
    """One training and its evaluation; None if it has updates to come."""
    method = METHODS[name]
    label = name if rank is None else f"{name}-r{rank}"
    title = method.title if rank is None else f"{method.title}, r={rank}"
    folder = config.output_dir / label
    task, state, tx = problem.build(config, prepared, name, rank)
    sizes = {"trained_bytes": tree_bytes(state.params)} | {
        "state_bytes": tree_bytes(state.opt_state)
    }
    identity = config.identity(name, rank) | {
        "the vocabulary": prepared.vocabulary.fingerprint
    }
    with Display(console) as display, contextlib.ExitStack() as stack:
        training = loop.Training(
            title,
            task,
            state,
            tx,
            methods.schedule(config, name),
            _pace(config, name),
            folder,
            identity,
            display,
            rate_flag=flag(f"{'lora_' * method.adapters}learning_rate"),
            resume=True,
        )
        stack.callback(training.close)
        if "flora" in name:
            fj.verify_state(tx, training.state.opt_state)
        for number in range(1, (config.stop_after or config.updates) + 1):
            training.advance(number)
    if training.done < config.updates:
        console.print(f"{title}: stopped after update {training.done}")
        return None
    rows = training.metrics.rows
    scores, samples = evaluate(
        config, prepared, name, rank, training.state.params, task.frozen
    )
    row = {
        "method": name,
        "title": title,
        "rank": rank,
        "learning_rate": config.rate(name),
        **sizes,
        "step_peak_bytes": training.peak_bytes,
        "step_seconds": records.median_seconds(rows),
        "validation_loss": records.last_validation_loss(rows),
        "perplexity": rows[-1]["perplexity"],
        **scores,
    }
    records.write_json(folder / "result.json", row)
    _show_samples(samples, folder / "samples.txt", console)
    return row


def _pace(config: Config, name: str) -> loop.Pace:
    return loop.Pace(
        updates=config.updates,
        micro_batches=METHODS[name].micro_batches(config),
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        stop_after=config.stop_after,
        seed=config.seed,
    )


def _show_samples(samples: list[Sample], path: pathlib.Path, console: Console) -> None:
    text = "\n\n".join(
        f"source:     {sample.source}\nreference:  {sample.reference}\n"
        f"prediction: {sample.prediction}"
        for sample in samples
    )
    path.write_text(text + "\n")
    console.print(text, highlight=False, markup=False)


def _report(config: Config, rows: list[records.Row], console: Console) -> None:
    """Prints the table; writes it as Markdown and the rows as JSON."""
    if not rows:
        return
    metrics = [name for name in rows[0] if name not in _NOT_METRICS]
    columns = ["method", "trained (bytes)", "state (bytes)", "s/update", *metrics]
    lines = [
        [
            row["title"],
            f"{row['trained_bytes']:,}",
            f"{row['state_bytes']:,}",
            f"{row['step_seconds']:.2f}",
            *(f"{row[name]:.3f}" for name in metrics),
        ]
        for row in rows
    ]
    table = Table(*columns, box=box.SIMPLE_HEAD, padding=0)
    for line in lines:
        table.add_row(*line)
    console.print(table)
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *lines))
    (config.output_dir / "report.md").write_text(text + "\n")
    records.write_json(
        config.output_dir / "results.json",
        {
            "config": _settings(config),
            "versions": versions(),
            "device": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "peak_bytes": devices.peak_bytes(),
            "rows": rows,
        },
    )


_NOT_METRICS = frozenset(
    (
        "method",
        "title",
        "rank",
        "learning_rate",
        "trained_bytes",
        "state_bytes",
        "step_peak_bytes",
        "step_seconds",
    )
)


def _settings(config: Config) -> dict[str, object]:
    return {
        name: str(value) if isinstance(value, pathlib.Path) else value
        for name, value in dataclasses.asdict(config).items()
    }
