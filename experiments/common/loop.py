"""The runs of a job: one model, one optimizer, from any checkpoint to the last update.

An update is a function of the state and of the update's number: its batch and its
dropout masks follow from that number. So a checkpoint is the state and a number, and a
run that was killed ends with the same parameters as one that was not.
"""

import contextlib
import functools
import json
import math
import shutil
import statistics
import time
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import jax
import numpy as np
import optax
from rich.console import Console
from rich.progress import Progress
from tensorboardX import SummaryWriter

import flora_jax as fj
from experiments.common import devices, display, problem, processes, records
from experiments.common.checkpoints import Checkpoints, State
from experiments.common.config import JobConfig, Run
from experiments.common.errors import ConfigError, NonFiniteLossError
from experiments.common.methods import METHODS, settings_of
from experiments.common.problem import Batch, Data, Problem
from experiments.common.state_bytes import leaf_plans, measure, step_bytes

_DROPOUT = zlib.crc32(b"dropout")


def training_step(
    problem: Problem,
    tx: optax.GradientTransformation,
    state: State,
    frozen: Any,
    batch: Batch,
    key: jax.Array,
    apply_updates: Callable[[Any, Any], Any] = optax.apply_updates,
) -> tuple[State, jax.Array]:
    """One call of the optimizer.

    An accumulating optimizer is called for each micro-batch; its updates are zeros
    until the last one of a cycle. Gradients and updates are float32, also of parameters
    that are kept in fewer bits.
    """
    params = optax.tree.cast(state.params, "float32")
    value, grads = problem.value_and_grad(state.opt_state, params, frozen, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, params)
    return State(apply_updates(state.params, updates), opt_state), value


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
            leaf_plans(data.params, settings_of(config, run.rank).sketch)
    if config.overwrite and processes.is_first():
        for run in runs:
            shutil.rmtree(run.folder, ignore_errors=True)
    # Nobody writes before what was there is gone.
    processes.wait()
    return runs


def train(runs: Sequence[Run], data: Data, console: Console) -> list["Training"]:
    """Trains in turns, one update each, so that other load slows all runs equally."""
    with display.bars(console) as bars, contextlib.ExitStack() as stack:
        started = []
        # All are compiled before the first update, whose time is measured.
        with ThreadPoolExecutor() as compilers:
            for run in runs:
                started.append(Training(run, data, bars, compilers))
                stack.callback(started[-1].close)
        config = runs[0].config
        for number in range(1, (config.stop_after or config.updates) + 1):
            for training in started:
                training.advance(number)
    return started


class Training:
    """A run that advances by one update when it is told to.

    So several can take turns, and other load on the machine slows all of them equally.
    """

    def __init__(self, run: Run, data: Data, bars: Progress, compilers: Executor):
        """Starts the run, or takes it up again from its last checkpoint.

        Args:
            run: the method and its settings.
            data: what it trains on.
            bars: where progress is shown.
            compilers: compiles the step while the next run starts.

        Raises:
            ConfigError: the checkpoint to resume from was made with other settings, or
                the processes of this run see different ones.
        """
        self.run, config = run, run.config
        self.problem, state, tx = problem.build(config, data, run.name, run.rank)
        sketch = settings_of(config, run.rank).sketch
        self._sizes = measure(run.method, sketch, *state)
        self._micro_batches = run.method.micro_batches(config)
        self._schedule = problem.learning_rate(config, run.name)
        self._step = functools.partial(training_step, self.problem, tx)
        identity = run.identity | {"the data": data.fingerprint}
        self._kept = Checkpoints(run.folder / "checkpoints", identity)
        self.state, self.done = devices.replicated(state), 0
        self.frozen = devices.replicated(self.problem.frozen)
        fresh = self._kept.latest() is None
        processes.check_same(f"the last checkpoint in {run.folder}", fresh)
        if not fresh:
            self._restore(tx)
        first, until = processes.is_first(), -1 if fresh else self.done
        path = run.folder / "metrics.jsonl"
        self._metrics = records.MetricsFile(path, keep_until=until, write=first)
        path = str(run.folder / "tensorboard")
        self._board = SummaryWriter(path, purge_step=self.done + 1, write_to_disk=first)
        self._bar = display.Bar(bars, run.title, config.updates, self.done)
        self._compiled = self._compile(compilers)
        if fresh:
            self._log({"update": 0, "tokens": 0} | self._evaluate())

    def _restore(self, tx: optax.GradientTransformation) -> None:
        """Goes back to the last checkpoint that can be read.

        Its settings agree, as far as they have flags. What the optimizer wrote into its
        own state says the rest: a sketch read with another projection is noise.
        """
        self.done, self.state = self._kept.restore(self.state)
        processes.check_same(f"the checkpoint in {self._kept.folder}", self.done)
        try:
            fj.verify_state(tx, self.state.opt_state)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{self._kept.folder} holds a checkpoint of another optimizer: {error}"
            ) from error

    def _compile(self, compilers: Executor) -> Future[tuple[jax.stages.Compiled, int]]:
        self._bar.say("compiling")
        step = jax.jit(self._step, donate_argnums=0, out_shardings=devices.on_all())
        part = self._parts(1)[0]
        lowered = step.lower(self.state, self.frozen, part, self._key(1, 0))

        def compiled() -> tuple[jax.stages.Compiled, int]:
            step = lowered.compile()
            return step, step_bytes(step)

        return compilers.submit(compiled)

    def _parts(self, number: int) -> list[Batch]:
        """The micro-batches of update `number`, on the devices."""
        batch = self.problem.batches[number - 1]
        parts = problem.micro_batches(batch, self._micro_batches)
        return list(map(devices.split, parts))

    def _key(self, number: int, part: int) -> jax.Array:
        """The dropout key of one micro-batch."""
        # Salted: models initialize their parameters from the bare key of the same seed.
        root = jax.random.fold_in(jax.random.key(self.run.config.seed), _DROPOUT)
        number = np.uint32(number * self._micro_batches + part)
        return jax.random.fold_in(root, number)

    def advance(self, number: int) -> None:
        """Does update `number`, counted from 1, unless a checkpoint holds it already.

        Raises:
            NonFiniteLossError: the loss is infinite or no number.
        """
        if number <= self.done:
            return
        config = self.run.config
        row = self._update(number)
        if number % config.eval_every == 0 or number == config.updates:
            row |= self._evaluate()
            self._check_finite(row, row["validation_loss"])
        self._log(row)  # before the checkpoint, which vouches for it
        last = number in (config.updates, config.stop_after)
        if number % config.checkpoint_every == 0 or last:
            self._kept.save(number, self.state)
        self.done = number

    def _evaluate(self) -> dict[str, float]:
        return self.problem.evaluate(self.state.params, self.frozen)

    def _update(self, number: int) -> records.Row:
        (step, size), losses = self._compiled.result(), []
        started = time.perf_counter()
        for i, batch in enumerate(self._parts(number)):
            key = self._key(number, i)
            self.state, loss = step(self.state, self.frozen, batch, key)
            losses.append(loss)
        jax.block_until_ready(self.state)
        seconds = time.perf_counter() - started
        row = {
            "update": number,
            "tokens": number * self.problem.tokens,
            "loss": float(np.mean([float(loss) for loss in losses])),
            "learning_rate": float(self._schedule(number - 1)),
            "seconds": seconds,
            "tokens_per_second": self.problem.tokens / seconds,
            "step_bytes": size,
            "process_peak_bytes": devices.peak_bytes(),
        }
        self._check_finite(row, row["loss"])
        return row

    def _check_finite(self, row: records.Row, loss: float) -> None:
        if not math.isfinite(loss):
            lora = "lora-" if self.run.method.adapters else ""
            raise NonFiniteLossError(
                f"{self.run.title}: the loss is {loss} at update {row['update']}, "
                f"learning rate {row['learning_rate']:.3g}; lower "
                f"`--{lora}learning-rate`"
            )

    def _log(self, row: records.Row) -> None:
        self._metrics.append(row)
        self._bar.show(row)
        for name, value in row.items():
            if name not in ("update", "tokens"):
                self._board.add_scalar(name, value, row["update"])

    def close(self) -> None:
        """Closes the files."""
        self._board.close()
        self._kept.close()

    def result(self, scores: dict[str, float] | None = None) -> records.Row:
        """Returns what tables say of a finished run; `result.json` keeps it."""
        run, rows, tokens = self.run, self._metrics.rows, self.problem.tokens
        losses = [row["loss"] for row in rows if "loss" in row]
        seconds = statistics.median(row["seconds"] for row in rows if "seconds" in row)
        row = {
            "run": run.folder.name,
            "method": run.name,
            "title": run.title,
            "rank": run.rank,
            "learning_rate": run.config.peak(run.name),
            "updates": run.config.updates,
            "tokens_per_update": tokens,
            **self._sizes,
            "step_peak_bytes": self._compiled.result()[1],
            "step_seconds": seconds,
            "tokens_per_second": tokens / seconds,
            "train_loss": records.final_loss(losses),
            "validation_loss": rows[-1]["validation_loss"],
            "perplexity": rows[-1]["perplexity"],
            **(scores or {}),
        }
        if processes.is_first():
            records.write_json(run.folder / "result.json", row)
        return row


def results(config: JobConfig) -> list[records.Row]:
    """Returns the rows of all finished runs in the output directory.

    `results.json` keeps them, together with what made them.
    """
    files, order = config.output_dir.glob("*/result.json"), list(METHODS)
    rows = sorted(
        (json.loads(file.read_text()) for file in files),
        key=lambda row: (order.index(row["method"]), row["rank"] or 0),
    )
    content = {"devices": jax.device_count(), "peak_bytes": devices.peak_bytes()}
    content = records.provenance(config) | content | {"rows": rows}
    records.write_json(config.output_dir / "results.json", content)
    return rows
