"""Data-parallel training that all-reduces sketches.

The same GPT-2, batches and optimizer, on all devices, each of which has the gradient of
its own examples: averaged as it is, as a sketch, or as a sketch with error feedback.
On a machine without accelerators JAX_NUM_CPU_DEVICES=8 makes eight devices.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

import flora_jax as fj
from experiments.common import devices, records
from experiments.common.collectives import collectives, total
from experiments.common.errors import ConfigError
from experiments.common.problem import Data, Problem, build
from experiments.main_job.run import prepare
from experiments.models.build import create
from experiments.reduction import report
from experiments.reduction.config import Config

P = jax.P


class Way(NamedTuple):
    """How gradients are averaged: "plain", as a "sketch", or that with "feedback"."""

    name: str
    rank: int = 0


def run(config: Config) -> None:
    """Trains all ways; writes rows, table and picture.

    Raises:
        ConfigError: the devices cannot share a batch, or the corpus is too small.
    """
    count = devices.mesh().size
    if config.batch_size % count:
        raise ConfigError(
            f"`--batch-size` must be a multiple of the {count} devices, got "
            f"{config.batch_size}"
        )
    data = prepare(config.job())
    sketched = itertools.product(("sketch", "feedback"), config.ranks)
    path = config.output_dir / "reduction.jsonl"
    rows = records.resume_rows(path)
    ways = [Way("plain"), *itertools.starmap(Way, sketched)]
    for way in track(ways, "ways of averaging"):
        for row in _train(config, way, data, rows):
            records.append_row(path, row)
    report.write(path)


def _train(
    config: Config, way: Way, data: Data, rows: list[records.Row]
) -> Iterator[records.Row]:
    """Yields the rows of one way that are still missing."""
    bench = None
    names = ("updates", "batch_size", "eval_every", "eval_examples")
    shared = {name: getattr(config, name) for name in names} | {
        "model": dataclasses.asdict(config.model),
        "devices": devices.mesh().size,
        "device": jax.devices()[0].device_kind,
        "corpus": data.fingerprint,
    }
    for learning_rate, seed in itertools.product(config.learning_rates, config.seeds):
        settings = {"way": way.name, "rank": way.rank, "learning_rate": learning_rate}
        settings |= {"seed": seed} | shared
        if any(settings.items() <= row.items() for row in rows):
            continue
        bench = bench or Bench(config, way, data)
        yield settings | bench.train(learning_rate, seed)


class Bench:
    """The compiled step of one way; learning rate and seed are its arguments."""

    def __init__(self, config: Config, way: Way, data: Data):
        """Compiles the step."""
        self._config, self._way, self._data = config.job(), way, data
        problem, self._tx, state = self._start(0)
        self._loss = problem.loss
        own = P(), P(), P("data")
        specs = {"in_specs": (own, P("data"), P(), P()), "out_specs": own}
        step = jax.shard_map(self._local_step, mesh=devices.mesh(), **specs)
        batch = devices.split(problem.batches[0])
        lowered = jax.jit(step, donate_argnums=0).lower(state, batch, 0, 0.1)
        self._step = lowered.compile()

    def _start(self, seed: int) -> tuple[Problem, Any, tuple[Any, Any, Any]]:
        """The problem, the optimizer; parameters, its state, each device's error."""
        params = create(self._config.model, seed)[1]
        data = dataclasses.replace(self._data, params=params)
        config = dataclasses.replace(self._config, seed=seed)
        problem, state, tx = build(config, data, "full_momentum", None)
        params, opt_state = devices.replicated(tuple(state))
        error: Any = ()
        if self._way.name == "feedback":
            own = jax.NamedSharding(devices.mesh(), P("data"))
            zeros = functools.partial(jnp.zeros, dtype=jnp.float32, device=own)
            count = devices.mesh().size
            error = jax.tree.map(lambda x: zeros((count, *x.shape)), params)
        return problem, tx, (params, opt_state, error)

    def _local_step(
        self, state: Any, batch: Any, step: jax.Array, learning_rate: jax.Array
    ) -> tuple[Any, Any, Any]:
        params, opt_state, error = state
        # The gradient of what is the same on all devices would be summed over them.
        varying = jax.lax.pcast(params, "data", to="varying")
        key = jax.random.key(0)  # There is no dropout here.
        grads = jax.grad(self._loss)(varying, {}, batch, key)
        if self._way.name == "plain":
            mean = jax.lax.pmean(grads, "data")
        else:
            sketch = fj.Sketch(self._way.rank, mask=fj.not_embeddings)
            own = jax.tree.map(lambda x: x[0], error) or None
            mean = fj.compressed_pmean(grads, "data", sketch, step=step, error=own)
            if error:
                mean, own = mean
                error = jax.tree.map(lambda x: x[None], own)
        updates, opt_state = self._tx.update(mean, opt_state, params)
        updates = optax.tree.scale(learning_rate, updates)
        return optax.apply_updates(params, updates), opt_state, error

    def train(self, learning_rate: float, seed: int) -> records.Row:
        """Trains once; the losses are None once it has diverged."""
        config = self._config
        problem, _, state = self._start(seed)
        curve = []
        for number in range(config.updates):
            batch = devices.split(problem.batches[number])
            # The projections of each seed are others, though the step is the same.
            step = seed * config.updates + number
            state = self._step(state, batch, step, learning_rate)
            jax.block_until_ready(state)
            done = number + 1
            if done % config.eval_every == 0 or done == config.updates:
                loss = problem.evaluate(state[0], {})["validation_loss"]
                curve.append([done, records.finite(loss)])
        row = {"validation_loss": curve[-1][1], "curve": curve}
        sent = collectives(self._step.as_text())
        reduced = total(each for each in sent if each.kind == "all-reduce")
        return row | {"bytes_all_reduced": reduced}
