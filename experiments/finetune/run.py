"""All trainings of one command, one after the other, and their table."""

import contextlib
import dataclasses
import json
import math
import pathlib
import shutil

import jax
from rich import box
from rich.console import Console
from rich.table import Table

import flora_jax as fj
from experiments.common import devices, loop, lora, processes, records
from experiments.common.display import Display, make_console
from experiments.common.errors import ConfigError, flag
from experiments.common.optimizers import matrices_only
from experiments.common.state_bytes import tree_bytes
from experiments.finetune import methods, problem
from experiments.finetune.config import Config
from experiments.finetune.evaluate import Sample, evaluate
from experiments.finetune.methods import METHODS
from experiments.finetune.prepare import Prepared, prepare
from experiments.main_job.run import versions
from experiments.models import save


def run(config: Config, prepared: Prepared | None = None) -> list[records.Row]:
    """Trains and evaluates every method at every rank.

    Args:
        config: the settings.
        prepared: what `prepare` makes of them, if it is there already.

    Returns:
        One row per training that is finished.

    Raises:
        ConfigError: the settings make no sense, or do not fit what lies on disk.
        NonFiniteLossError: a training diverged.
    """
    console = make_console()
    if prepared is None:
        with console.status("Preparing data, vocabulary and model"):
            prepared = prepare(config)
    _describe(config, prepared, console)
    wanted = [
        (name, rank)
        for name in config.methods
        for rank in (config.ranks if METHODS[name].ranked else (None,))
    ]
    for name, rank in wanted:  # all of them before the first hours are spent
        _check_rank(prepared, name, rank)
    for name, rank in wanted:
        folder = _folder(config, name, rank)
        if config.overwrite and processes.is_first() and folder.exists():
            shutil.rmtree(folder)
    processes.wait()
    rows = [_train(config, prepared, name, rank, console) for name, rank in wanted]
    if processes.is_first():
        _report(config, console)
    return [row for row in rows if row is not None]


def _folder(config: Config, name: str, rank: int | None) -> pathlib.Path:
    return config.output_dir / (name if rank is None else f"{name}-r{rank}")


def _check_rank(prepared: Prepared, name: str, rank: int | None) -> None:
    """Refuses a sketch of nothing: it would be the uncompressed method."""
    if "flora" not in name:
        return
    plans = jax.tree.leaves(
        fj.plan_leaves(prepared.params, rank, mask=matrices_only),
        is_leaf=lambda node: isinstance(node, fj.LeafPlan),
    )
    if all(plan.dense_reason is not None for plan in plans):
        widest = max(plans, key=lambda plan: math.prod(plan.shape))
        raise ConfigError(
            f"`--ranks` {rank} compresses no matrix of this model ({widest.path}: "
            f"{widest.dense_reason}); give a lower rank or a larger --model"
        )


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
    title = _title(name, rank)
    task, state, tx = problem.build(config, prepared, name, rank)
    sizes = {
        "trained_bytes": tree_bytes(state.params),
        "state_bytes": tree_bytes(state.opt_state),
    }
    with Display(console) as display, contextlib.ExitStack() as stack:
        training = loop.Training(
            title,
            task,
            state,
            tx,
            methods.schedule(config, name),
            _pace(config, name),
            _folder(config, name, rank),
            config.identity(name, rank) | {"the data": prepared.fingerprint},
            display,
            rate_flag=flag(f"{'lora_' * METHODS[name].adapters}learning_rate"),
            resume=True,
        )
        stack.callback(training.close)
        for number in range(1, (config.stop_after or config.updates) + 1):
            training.advance(number)
    if training.done < config.updates:
        console.print(f"{title}: stopped after update {training.done}")
        return None
    return _finish(config, prepared, name, rank, training, sizes, console)


def _title(name: str, rank: int | None) -> str:
    title = METHODS[name].title
    return title if rank is None else f"{title}, r={rank}"


def _finish(
    config: Config,
    prepared: Prepared,
    name: str,
    rank: int | None,
    training: loop.Training,
    sizes: dict[str, int],
    console: Console,
) -> records.Row:
    """Evaluates a finished training; writes its model, result and samples."""
    params = lora.join(training.state.params, training.frozen)
    if METHODS[name].adapters:
        params = lora.merge(params, rank, config.alpha(rank))
    folder = _folder(config, name, rank)
    if processes.is_first():  # Before the evaluation, which may fail.
        save(params, prepared.model, folder / "model")
        prepared.vocabulary.save(folder / "model")
    scores, samples = evaluate(config, prepared, params)
    rows = training.metrics.rows
    row = {
        "method": name,
        "title": _title(name, rank),
        "rank": rank,
        "learning_rate": config.rate(name),
        **sizes,
        "step_peak_bytes": training.step_bytes,
        "step_seconds": records.median_seconds(rows),
        "validation_loss": records.last_validation_loss(rows),
        "perplexity": rows[-1]["perplexity"],
        **scores,
    }
    if processes.is_first():
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


def _report(config: Config, console: Console) -> None:
    """Prints the table of all finished trainings; writes it, and the rows as JSON."""
    files = config.output_dir.glob("*/result.json")
    rows = sorted(
        (json.loads(file.read_text()) for file in files),
        key=lambda row: (list(METHODS).index(row["method"]), row["rank"] or 0),
    )
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
