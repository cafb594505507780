"""The runs of one cell of a grid, which differ in learning rate and seed."""

import math
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax

from experiments.common import loop, lora
from experiments.common.checkpoints import State
from experiments.common.methods import matrices
from experiments.common.state_bytes import step_bytes, tree_bytes
from experiments.models.build import Params
from experiments.sweep.tasks import Task


class Bench:
    """The compiled step of one cell; the learning rate is its argument."""

    def __init__(self, task: Task):
        """Compiles the step."""
        self._task = task
        self._parts = task.method.micro_batches(task.config)
        problem, state = task.start(0)
        self._bytes = measure(task.optimizer(1.0, 0), state.params)

        def step(state: State, frozen: Any, batch: Any, rate: float) -> Any:
            tx, key = task.optimizer(rate, 0), jax.random.key(0)  # There is no dropout.
            return loop.training_step(
                problem.loss, tx, state, frozen, batch, key, problem.gradient
            )

        started = time.perf_counter()
        part = self._split(problem.batches[0])[0]
        jitted = jax.jit(step, donate_argnums=0)
        self._compiled = jitted.lower(state, problem.frozen, part, 0.1).compile()
        self._compile_seconds = time.perf_counter() - started

    def _split(self, batch: loop.Batch) -> list[loop.Batch]:
        return [
            jax.tree.map(lambda x: np.split(x, self._parts)[i], batch)  # noqa: B023
            for i in range(self._parts)
        ]

    def train(self, rate: float, seed: int) -> dict[str, Any]:
        """Trains once; losses are None if it diverged."""
        problem, state = self._task.start(seed)
        losses, seconds = [], []
        for number in range(self._task.config.updates):
            parts = self._split(problem.batches[number])
            started = time.perf_counter()
            total = 0.0
            for part in parts:
                state, loss = self._compiled(state, problem.frozen, part, rate)
                total += float(loss)
            losses.append(total / self._parts)
            seconds.append(time.perf_counter() - started)
        tenth = max(1, len(losses) // 10)
        scores = self._task.judge(problem, state)
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


def measure(tx: optax.GradientTransformation, params: Params) -> tuple[int, int]:
    """Counts the bytes of a state, and those of the matrices alone; allocates nothing.

    Args:
        tx: the optimizer.
        params: what it trains, or the shapes.

    Returns:
        Bytes of the whole state, and of the state for the matrices alone: those that
        may be sketched, or LoRA's adapters in their place.
    """
    chosen = jax.tree.leaves(matrices(params))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for (path, leaf), own in zip(
            jax.tree_util.tree_leaves_with_path(params), chosen, strict=True
        )
        if own or path[-1].key in lora.ADAPTERS
    }
    whole, part = (jax.eval_shape(tx.init, tree) for tree in (params, flat))
    return tree_bytes(whole), tree_bytes(part)
