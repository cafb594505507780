"""Data-parallel training that reduces sketches: `python -m experiments.reduction`.

The same GPT-2, batches and optimizer, on all devices, each of which has the gradient of
its own examples: averaged as it is, as a sketch, or as a sketch with error feedback.
On a machine without accelerators JAX_NUM_CPU_DEVICES=8 makes eight devices.
"""

import dataclasses
import functools
import itertools
import math
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from rich.progress import track

import flora_jax as fj
from experiments.common import devices, optimizers, records
from experiments.common.errors import ConfigError, NonFiniteLossError
from experiments.common.optimizers import matrices_only
from experiments.data.packing import Data, batches, load
from experiments.main_job import training
from experiments.main_job.config import Config as Experiment
from experiments.models import GPT2Config, create
from experiments.reduction.report import Way, draw, table

P = jax.P
_ISOMETRY = fj.CountSketch(scale="isometric")


@dataclasses.dataclass(frozen=True)
class Config:
    """Each way is trained at every rate with every seed; its best rate counts."""

    ranks: tuple[int, ...] = (32, 128)
    """Ranks of the sketches."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Peak rates of Adafactor with momentum, relative to each parameter's size."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of parameters, data order and projections."""
    updates: int = 120
    """Updates of each training."""
    batch_size: int = 8
    """Packed examples of one update; a multiple of the number of devices."""
    eval_every: int = 20
    """Updates between two points of a curve."""
    eval_examples: int = 96
    """Packed examples in the fixed validation set."""
    model: GPT2Config = dataclasses.field(default_factory=lambda: GPT2Config(layers=2))
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where the tokenizer and the packed examples are kept."""
    corpus_dir: pathlib.Path | None = None
    """Folder of Python sources to train on, in place of the standard library."""
    output_dir: pathlib.Path = pathlib.Path("runs/reduction")
    """Where rows, table and picture go; runs that stand there are not run again."""

    def validate(self) -> None:
        """Raises ConfigError for settings that make no sense."""
        self.experiment(0).validate()
        for name in ("ranks", "learning_rates", "seeds"):
            if not getattr(self, name):
                raise ConfigError(f"`--{name.replace('_', '-')}` names none; give one")
        wrong = [rank for rank in self.ranks if not 0 < rank < self.model.width]
        if wrong:
            raise ConfigError(
                f"`--ranks` must be below the width {self.model.width}, got {wrong}"
            )

    def experiment(self, seed: int) -> Experiment:
        """The settings of the main job that these trainings share."""
        return Experiment(
            updates=self.updates,
            batch_size=self.batch_size,
            micro_batches=1,
            eval_examples=self.eval_examples,
            model=self.model,
            data_dir=self.data_dir,
            corpus_dir=self.corpus_dir,
            seed=seed,
        )


def run(config: Config) -> None:
    """Trains all ways; writes rows, table and picture.

    Raises:
        ConfigError: the devices cannot share a batch, or settings make no sense.
        NonFiniteLossError: one way diverged at every rate.
    """
    count = devices.mesh().size
    if config.batch_size % count:
        raise ConfigError(
            f"`--batch-size` must be a multiple of the {count} devices, got "
            f"{config.batch_size}"
        )
    data = load(config.experiment(0))
    ways = [Way("plain")]
    ways += [Way(*x) for x in itertools.product(("sketch", "feedback"), config.ranks)]
    path = config.output_dir / "runs.jsonl"
    rows = records.resume_rows(path)
    best = []
    for way in track(ways, "ways of averaging"):
        for row in _train(config, way, data, rows):
            rows.append(row)
            records.append_row(path, row)
        best.append(_best(rows, config, data, way))
    (config.output_dir / "table.md").write_text(table(best))
    draw(best, config.output_dir / "loss.png")


def _train(
    config: Config, way: Way, data: Data, rows: list[records.Row]
) -> Iterator[records.Row]:
    """Yields the rows of one way that are still missing."""
    bench = None
    for rate, seed in itertools.product(config.learning_rates, config.seeds):
        settings = _settings(config, data, way, rate, seed)
        if any(settings.items() <= row.items() for row in rows):
            continue
        bench = bench or Bench(config, way, data)
        yield settings | bench.train(rate, seed)


def _settings(
    config: Config, data: Data, way: Way, rate: float, seed: int
) -> records.Row:
    return {
        "way": way.name,
        "rank": way.rank,
        "learning_rate": rate,
        "seed": seed,
        "updates": config.updates,
        "batch_size": config.batch_size,
        "eval_every": config.eval_every,
        "eval_examples": config.eval_examples,
        "model": dataclasses.asdict(config.model),
        "devices": devices.mesh().size,
        "device": jax.devices()[0].device_kind,
        "corpus": data.fingerprint,
    }


def _best(
    rows: list[records.Row], config: Config, data: Data, way: Way
) -> list[records.Row]:
    """The rows of all seeds at the rate with the lowest mean loss."""
    groups = []
    for rate in config.learning_rates:
        wanted = [_settings(config, data, way, rate, seed) for seed in config.seeds]
        mine = [row for row in rows if any(w.items() <= row.items() for w in wanted)]
        if all(row["validation_loss"] is not None for row in mine):
            groups.append(mine)
    if not groups:
        raise NonFiniteLossError(
            f"{way.title}: diverged at every rate; give lower `--learning-rates`"
        )
    return min(groups, key=lambda group: sum(row["validation_loss"] for row in group))


class Bench:
    """The compiled step of one way; learning rate and seed are its arguments."""

    def __init__(self, config: Config, way: Way, data: Data):
        """Compiles the step."""
        self._config, self._way, self._data = config, way, data
        graphdef, self._params = create(config.model, config.seeds[0])
        self._problem = training.problem(config.experiment(0), data, graphdef)
        compiled = jax.jit(
            jax.shard_map(
                self._local_step,
                mesh=devices.mesh(),
                in_specs=(P(), P(), P("data"), P("data"), P(), P(), P()),
                out_specs=(P(), P(), P("data")),
            ),
            donate_argnums=(0, 1, 2),
        )
        state = self._start(0)
        tokens = devices.split(self._problem.batches[0])
        self._step = compiled.lower(*state, tokens, 0, 0.1, 0).compile()

    def _optimizer(self, rate: jax.typing.ArrayLike) -> optax.GradientTransformation:
        # Updates are linear in the rate, which is an argument of the step.
        schedule = optimizers.schedule(1.0, self._config.updates, 0.1, end=0.1)
        adafactor = optax.adafactor(schedule, momentum=0.9)
        return optax.chain(adafactor, optax.scale(rate))

    def _start(self, seed: int) -> tuple[Any, Any, Any]:
        """Parameters, optimizer state, and the error of each device."""
        _, params = create(self._config.model, seed)
        state = self._optimizer(1.0).init(params)
        if self._way.name != "feedback":
            return *devices.replicated((params, state)), ()
        count = devices.mesh().size
        own = jax.NamedSharding(devices.mesh(), P("data"))
        error = jax.tree.map(
            lambda x: jnp.zeros((count, *x.shape), jnp.float32, device=own), params
        )
        return *devices.replicated((params, state)), error

    def _local_step(
        self,
        params: Any,
        state: Any,
        error: Any,
        tokens: jax.Array,
        number: jax.Array,
        rate: jax.Array,
        seed: jax.Array,
    ) -> tuple[Any, Any, Any]:
        # The gradient of what is the same on all devices would be summed over them.
        varying = jax.lax.pcast(params, "data", to="varying")
        key = jax.random.key(0)  # There is no dropout here.
        grads = jax.grad(self._problem.loss)(varying, {}, tokens, key)
        if self._way.name == "plain":
            mean = jax.lax.pmean(grads, "data")
        else:
            # Each seed has S of its own.
            root = jax.random.key_data(jax.random.key(seed))
            average = functools.partial(
                fj.compressed_pmean,
                axis_name="data",
                rank=self._way.rank,
                key=root,
                step=number,
                mask=matrices_only,
            )
            if self._way.name == "sketch":
                mean = average(grads)
            else:
                own = jax.tree.map(lambda x: x[0], error)
                mean, own = average(grads, error=own, projection=_ISOMETRY)
                error = jax.tree.map(lambda x: x[None], own)
        updates, state = self._optimizer(rate).update(mean, state, params)
        return optax.apply_updates(params, updates), state, error

    def train(self, rate: float, seed: int) -> records.Row:
        """Trains once; the losses are None once it has diverged."""
        state = self._start(seed)
        order = batches(self._data, self._config.batch_size, seed)
        curve = []
        for number in range(self._config.updates):
            tokens = devices.split(order[number])
            state = self._step(*state, tokens, number, rate, seed)
            jax.block_until_ready(state)
            done = number + 1
            if done % self._config.eval_every == 0 or done == self._config.updates:
                loss = self._problem.evaluate(state[0], {})["validation_loss"]
                curve.append([done, loss if math.isfinite(loss) else None])
        return {
            "validation_loss": curve[-1][1],
            "curve": curve,
            "bytes_reduced": bytes_reduced(self._step),
        }


def bytes_reduced(compiled: Any) -> int:
    """Bytes of the results of all all-reduces of floats in a compiled program."""
    total = 0
    pattern = r"= (.*) all-reduce(?:-start)?\("
    for result in re.findall(pattern, compiled.as_text()):
        for bits, dims in re.findall(r"\bb?f(16|32)\[([\d,]*)\]", result):
            total += int(bits) // 8 * math.prod(int(n) for n in dims.split(",") if n)
    return total
