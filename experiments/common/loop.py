"""The training loop: one model, one optimizer, from any checkpoint to the last update.

An update is a function of the state and of the update's number: its batch and its
dropout masks follow from that number. So a checkpoint is the state and a number, and a
run that was killed ends with the same parameters as one that was not.
"""

import functools
import math
import time
import zlib
from typing import Any

import jax
import numpy as np
import optax
from tensorboardX import SummaryWriter

import flora_jax as fj
from experiments.common import devices, gradients, processes, records
from experiments.common.checkpoints import Checkpoints, State
from experiments.common.config import Run
from experiments.common.display import Display
from experiments.common.errors import ConfigError, NonFiniteLossError
from experiments.common.gradients import Gradient, Loss
from experiments.common.methods import settings_of
from experiments.common.problem import Batch, Data, build, learning_rate
from experiments.common.state_bytes import measure, step_bytes

_DROPOUT = zlib.crc32(b"dropout")


def training_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    state: State,
    frozen: Any,
    batch: Batch,
    key: jax.Array,
    gradient: Gradient = gradients.full,
) -> tuple[State, jax.Array]:
    """One call of the optimizer.

    An accumulating optimizer is called for each micro-batch; its updates are zeros
    until the last one of a cycle.
    """
    value_and_grad = gradient(loss, state.opt_state)
    value, grads = value_and_grad(state.params, frozen, batch, key)
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state), value


class Training:
    """A run that advances by one update when it is told to.

    So several can take turns, and what else the machine does slows all of them alike.
    """

    def __init__(self, run: Run, data: Data, display: Display):
        """Starts the run, or takes it up again from its last checkpoint.

        Args:
            run: the method and its settings.
            data: what it trains on.
            display: where progress is shown.

        Raises:
            ConfigError: the checkpoint to resume from was made with other settings, or
                the processes of this run see different ones.
        """
        self.run, config = run, run.config
        self.problem, state, tx = build(config, data, run.name, run.rank)
        sketch = settings_of(config, run.rank).sketch
        self.sizes = measure(run.method, sketch, *state)
        self._micro_batches = run.method.micro_batches(config)
        self._schedule = learning_rate(config, run.name)
        self._step = functools.partial(
            training_step, self.problem.loss, tx, gradient=self.problem.gradient
        )
        identity = run.identity | {"the data": data.fingerprint}
        self._kept = Checkpoints(run.folder / "checkpoints", identity)
        self.state, self.done = devices.replicated(state), 0
        self.frozen = devices.replicated(self.problem.frozen)
        fresh = self._kept.latest() is None
        processes.check_same(f"the last checkpoint in {run.folder}", fresh)
        if not fresh:
            self._restore(tx)
        first = processes.is_first()
        self.metrics = records.MetricsFile(
            run.folder / "metrics.jsonl",
            keep_until=-1 if fresh else self.done,
            write=first,
        )
        self._board = SummaryWriter(
            str(run.folder / "tensorboard"),
            purge_step=self.done + 1,
            write_to_disk=first,
        )
        self._bar = display.add(run.title, config.updates, self.done)
        self._compile()
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

    def _compile(self) -> None:
        self._bar.say("compiling")
        step = jax.jit(self._step, donate_argnums=0, out_shardings=devices.on_all())
        part = self._parts(1)[0]
        lowered = step.lower(self.state, self.frozen, part, self._key(1, 0))
        self._compiled = lowered.compile()
        self.step_bytes = step_bytes(self._compiled)

    def _parts(self, number: int) -> list[Batch]:
        """The micro-batches of update `number`, on the devices."""
        batch = self.problem.batches[number - 1]
        leaves, treedef = jax.tree.flatten(batch)
        parts = zip(
            *(np.split(leaf, self._micro_batches) for leaf in leaves), strict=True
        )
        return [devices.split(jax.tree.unflatten(treedef, part)) for part in parts]

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
        losses = []
        started = time.perf_counter()
        parts = self._parts(number)
        for i, batch in enumerate(parts):
            key = self._key(number, i)
            self.state, loss = self._compiled(self.state, self.frozen, batch, key)
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
            "step_bytes": self.step_bytes,
            "process_peak_bytes": devices.peak_bytes(),
        }
        self._check_finite(row, row["loss"])
        return row

    def _check_finite(self, row: records.Row, loss: float) -> None:
        if not math.isfinite(loss):
            lora = "lora-" * self.run.method.adapters
            raise NonFiniteLossError(
                f"{self.run.title}: the loss is {loss} at update {row['update']}, "
                f"learning rate {row['learning_rate']:.3g}; lower "
                f"`--{lora}learning-rate`"
            )

    def _log(self, row: records.Row) -> None:
        self.metrics.append(row)
        self._bar.show(row)
        for name, value in row.items():
            if name not in ("update", "tokens"):
                self._board.add_scalar(name, value, row["update"])

    def close(self) -> None:
        """Closes the files."""
        self._board.close()
        self._kept.close()
