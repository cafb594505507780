"""One model, one optimizer: the training step and its clock."""

import functools
import math
import time
from collections.abc import Callable

import jax
import numpy as np
import optax
from flax import nnx

from experiments import gpt2, methods, records
from experiments.checkpoints import State
from experiments.config import Config, flag
from experiments.data import Data, batches
from experiments.methods import Method


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


def mean_loss(
    loss: Callable[[gpt2.Params, np.ndarray], jax.Array],
    params: gpt2.Params,
    examples: np.ndarray,
    size: int,
) -> float:
    """Mean of a loss over examples, `size` of them at a time."""
    total = 0.0
    for start in range(0, len(examples), size):
        chunk = examples[start : start + size]
        total += float(loss(params, chunk)) * len(chunk)
    return total / len(examples)


class Trainer:
    """The compiled pieces of one training; the state is the caller's."""

    def __init__(
        self,
        method: Method,
        config: Config,
        dataset: Data,
        graphdef: nnx.GraphDef,
        tx: optax.GradientTransformation,
    ):
        """Keeps what the training consists of; `compile` comes before `update`."""
        self.method = method
        self.config = config
        self.parts = method.micro_batches(config)
        self.tokens_per_update = config.batch_size * config.model.context
        self._schedule = methods.schedule(config, method.name)
        self._validation = dataset.validation
        self._batches = batches(dataset, config.batch_size, config.seed)
        self._step = functools.partial(training_step, graphdef, tx)
        self._loss = jax.jit(functools.partial(gpt2.next_token_loss, graphdef))

    def compile(self, state: State) -> None:
        """Compiles the step for states of this shape."""
        tokens = self._batches[0][: self.config.batch_size // self.parts]
        started = time.perf_counter()
        lowered = jax.jit(self._step, donate_argnums=0).lower(state, tokens)
        self._compiled = lowered.compile()
        self.compile_seconds = time.perf_counter() - started

    @property
    def peak_bytes(self) -> int:
        """The compiler's account of the memory of one step.

        The peak that it reports leaves out temporaries on CPU, hence the sum.
        """
        stats = self._compiled.memory_analysis()
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
            state, loss = self._compiled(state, tokens)
            losses.append(loss)
        jax.block_until_ready(state)
        seconds = time.perf_counter() - started
        row = {
            "update": number,
            "tokens": number * self.tokens_per_update,
            "loss": float(np.mean([float(loss) for loss in losses])),
            "learning_rate": float(self._schedule(number - 1)),
            "seconds": seconds,
            "tokens_per_second": self.tokens_per_update / seconds,
        }
        self._check_finite(row)
        return state, row

    def validation_loss(self, state: State) -> float:
        """Mean cross-entropy on the fixed validation set, in nats per token."""
        size = self.config.batch_size
        return mean_loss(self._loss, state.params, self._validation, size)

    def _check_finite(self, row: records.Row) -> None:
        if not math.isfinite(row["loss"]):
            raise NonFiniteLossError(
                f"{self.method.title}: the loss is {row['loss']} at update "
                f"{row['update']}, learning rate {row['learning_rate']:.3g}; lower "
                f"`{flag('learning_rates.' + self.method.name)}`, now "
                f"{self.config.peak_learning_rate(self.method.name):g}"
            )
