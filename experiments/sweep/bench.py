"""The trainings of one cell of a grid, which differ in learning rate and seed."""

import math
import statistics
import time
from typing import Any

import jax

from experiments.common import loop
from experiments.common.checkpoints import State
from experiments.common.state_bytes import step_bytes, tree_bytes
from experiments.family.recipes import measure
from experiments.sweep.tasks import Task


class Bench:
    """The compiled step of one cell; learning rate and seed are its arguments."""

    def __init__(self, task: Task):
        """Compiles the step."""
        self.task = task
        start = task.start(0)
        self._bytes = measure(task.optimizer(1.0), start.state.params)
        started = time.perf_counter()
        part = self._split(start.batches[0])[0]
        step = jax.jit(self._step, donate_argnums=0)
        self._compiled = step.lower(start.state, start.frozen, part, 0.1).compile()
        self._compile_seconds = time.perf_counter() - started

    def _split(self, batch: loop.Batch) -> list[loop.Batch]:
        count = self.task.micro_batches
        return [
            jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:])[i], batch)  # noqa: B023
            for i in range(count)
        ]

    def _step(
        self, state: State, frozen: Any, batch: loop.Batch, rate: float
    ) -> tuple[State, jax.Array]:
        tx = self.task.optimizer(rate)
        key = jax.random.key(0)  # There is no dropout here.
        return loop.training_step(self.task.loss, tx, state, frozen, batch, key)

    def train(self, rate: float, seed: int) -> dict[str, Any]:
        """Trains once; losses are None if it diverged."""
        state, frozen, order = self.task.start(seed)
        losses, seconds = [], []
        for number in range(self.task.updates):
            batch = order[number]
            started = time.perf_counter()
            total = 0.0
            for part in self._split(batch):
                state, loss = self._compiled(state, frozen, part, rate)
                total += float(loss)
            losses.append(total / self.task.micro_batches)
            seconds.append(time.perf_counter() - started)
        tenth = max(1, len(losses) // 10)
        scores = self.task.judge(state.params, frozen)
        return {
            "train_loss": _finite(statistics.mean(losses[-tenth:])),
            **{name: _finite(score) for name, score in scores.items()},
            "step_seconds": statistics.median(seconds),
            "compile_seconds": self._compile_seconds,
            "trained_bytes": tree_bytes(state.params),
            "state_bytes": self._bytes[0],
            "matrix_bytes": self._bytes[1],
            "step_bytes": step_bytes(self._compiled),
        }


def _finite(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
