"""Trains one model with one optimizer."""

import functools
import math
import pathlib
import time
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

import flora_jax as fj
from experiments import gpt2, memory, methods, records
from experiments.checkpoints import Checkpoints, State
from experiments.config import Config, flag
from experiments.data import Data, batches
from experiments.display import Display
from experiments.methods import METHODS, Method


class NonFiniteLossError(RuntimeError):
    """The training diverged; the message says where and what to lower."""


def training_step(
    graphdef: nnx.GraphDef,
    tx: optax.GradientTransformation,
    state: State,
    tokens: jax.Array,
) -> tuple[State, jax.Array]:
    """One call of the optimizer, on tokens (batch, context + 1).

    An accumulating optimizer is called for each micro-batch; its updates are zeros
    until the last one of a cycle.
    """
    loss_fn = functools.partial(gpt2.next_token_loss, graphdef)
    loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state), loss


class Trainer:
    """The compiled pieces of one training."""

    def __init__(self, method: Method, config: Config, dataset: Data):
        """Builds the optimizer, draws the model and compiles the step."""
        self.method = method
        self.config = config
        self.parts = method.micro_batches(config)
        self.tx = methods.optimizer(config, method.name)
        self.schedule = methods.schedule(config, method.name)
        self._dataset = dataset
        self._batches = batches(dataset, config.batch_size, config.seed)
        self.graphdef, params = gpt2.create(config.model, config.seed)
        self.initial = State(params, self.tx.init(params))
        self._loss = jax.jit(functools.partial(gpt2.next_token_loss, self.graphdef))
        self._compile()

    def _compile(self) -> None:
        step = functools.partial(training_step, self.graphdef, self.tx)
        tokens = self._batches[0][: self.config.batch_size // self.parts]
        started = time.perf_counter()
        lowered = jax.jit(step, donate_argnums=0).lower(self.initial, tokens)
        self._step = lowered.compile()
        self.compile_seconds = time.perf_counter() - started

    @property
    def peak_bytes(self) -> int:
        """The compiler's account of the memory of one step.

        The peak that it reports leaves out temporaries on CPU, hence the sum.
        """
        stats = self._step.memory_analysis()
        return (
            stats.argument_size_in_bytes
            + stats.output_size_in_bytes
            + stats.temp_size_in_bytes
            - stats.alias_size_in_bytes
        )

    def update(self, state: State, number: int) -> tuple[State, records.Row]:
        """Does update `number`, counted from 1; returns its row of the metrics.

        Raises:
            NonFiniteLossError: the loss is infinite or no number.
        """
        micro_batches = np.split(self._batches[number - 1], self.parts)
        losses = []
        started = time.perf_counter()
        for tokens in micro_batches:
            state, loss = self._step(state, tokens)
            losses.append(loss)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
        row = {
            "update": number,
            "tokens": number * self.tokens_per_update,
            "loss": float(np.mean([float(loss) for loss in losses])),
            "learning_rate": float(self.schedule(number - 1)),
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_update / seconds,
        }
        self._check_finite(row)
        return state, row

    @property
    def tokens_per_update(self) -> int:
        """Predicted tokens in one update."""
        return self.config.batch_size * self.config.model.context

    def validation_loss(self, state: State) -> float:
        """Mean cross-entropy on the fixed validation set, in nats per token."""
        examples = self._dataset.validation
        size = self.config.batch_size
        total = 0.0
        for start in range(0, len(examples), size):
            chunk = examples[start : start + size]
            total += float(self._loss(state.params, chunk)) * len(chunk)
        return total / len(examples)

    def _check_finite(self, row: records.Row) -> None:
        if not math.isfinite(row["loss"]):
            raise NonFiniteLossError(
                f"{self.method.title}: the loss is {row['loss']} at update "
                f"{row['update']}, learning rate {row['learning_rate']:.3g}; lower "
                f"`{flag('learning_rates.' + self.method.name)}`, now "
                f"{self.config.peak_learning_rate(self.method.name):g}"
            )


def train(
    name: str, config: Config, dataset: Data, folder: pathlib.Path, display: Display
) -> records.Summary | None:
    """Trains to the last update, or to `config.stop_after`.

    Args:
        name: the method, a key of `METHODS`.
        config: the settings.
        dataset: the packed corpus.
        folder: where this training keeps its metrics and checkpoints.
        display: where progress is shown.

    Returns:
        The summary; None if training stopped before the last update.

    Raises:
        ConfigError: the checkpoint to resume from was made with other settings.
        NonFiniteLossError: the loss is infinite or no number.
    """
    method = METHODS[name]
    trainer = Trainer(method, config, dataset)
    state_bytes = memory.measure(method, config, *trainer.initial)
    with Checkpoints(folder / "checkpoints", identity(config, name, dataset)) as kept:
        done, state = _start(trainer, kept, config)
        metrics = records.MetricsFile(folder / "metrics.jsonl", keep_until=done)
        if done < 0:
            done = 0
            loss = trainer.validation_loss(state)
            metrics.append({"update": 0, "tokens": 0, "validation_loss": loss})
        _loop(trainer, state, done, metrics, kept, display)
    if metrics.rows[-1]["update"] < config.updates:
        return None
    summary = _summarize(trainer, state_bytes, metrics.rows)
    records.write_json(folder / "summary.json", summary.as_json())
    return summary


def identity(config: Config, name: str, dataset: Data) -> dict[str, Any]:
    """Returns what has to agree for a checkpoint to be continued."""
    return config.identity(name) | {"--corpus-dir": dataset.fingerprint}


def _start(trainer: Trainer, kept: Checkpoints, config: Config) -> tuple[int, State]:
    """Returns the updates done, -1 for a new training, and the state."""
    if not config.resume or kept.latest() is None:
        return -1, trainer.initial
    done, state = kept.restore(trainer.initial)
    if trainer.method.compressed:
        fj.verify_state(trainer.tx, state.opt_state)
    return done, state


def _loop(
    trainer: Trainer,
    state: State,
    done: int,
    metrics: records.MetricsFile,
    kept: Checkpoints,
    display: Display,
) -> None:
    config = trainer.config
    stop = config.updates if config.stop_after is None else config.stop_after
    bar = display.add(trainer.method.title, config.updates, done)
    for number in range(done + 1, stop + 1):
        state, row = trainer.update(state, number)
        if number % config.eval_every == 0 or number == config.updates:
            row["validation_loss"] = trainer.validation_loss(state)
        metrics.append(row)  # before the checkpoint, which vouches for it
        if number % config.checkpoint_every == 0 or number == stop:
            kept.save(number, state)
        bar.show(row)


def _summarize(
    trainer: Trainer, state_bytes: memory.StateBytes, rows: list[records.Row]
) -> records.Summary:
    method, config = trainer.method, trainer.config
    step_seconds = records.median_seconds(rows)
    return records.Summary(
        method=method.name,
        title=method.title,
        kind=method.kind,
        compressed=method.compressed,
        learning_rate=config.peak_learning_rate(method.name),
        updates=config.updates,
        micro_batches=trainer.parts,
        tokens_per_update=trainer.tokens_per_update,
        train_loss=records.final_train_loss(rows),
        validation_loss=records.last_validation_loss(rows),
        step_seconds=step_seconds,
        tokens_per_second=trainer.tokens_per_update / step_seconds,
        compile_seconds=trainer.compile_seconds,
        step_peak_bytes=trainer.peak_bytes,
        bytes=state_bytes,
        metrics=tuple(rows),
    )
