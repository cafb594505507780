"""What one cell of a grid trains: the model, the optimizer, the data, the verdict."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import optax

from experiments.common import lora, optimizers
from experiments.common.checkpoints import State
from experiments.common.errors import ConfigError
from experiments.common.gradients import Loss
from experiments.common.loop import Batch
from experiments.data import packing as corpora
from experiments.data.packing import Data, batches
from experiments.family import recipes as family
from experiments.family.recipes import FAMILY
from experiments.finetune.config import Config as FinetuneConfig
from experiments.finetune.evaluate import evaluate as decode_and_score
from experiments.finetune.methods import METHODS
from experiments.finetune.prepare import Prepared, prepare
from experiments.finetune.problem import build
from experiments.main_job import methods, training
from experiments.main_job.config import Config
from experiments.models import GPT2Config, create

Cell = dict[str, Any]
"""What a grid varies: method, rank, b2, projection, options."""

# The main job calls one of the seven otherwise.
_ALIASES = {"adafactor_momentum": "full_momentum"}


class Start(NamedTuple):
    """Where a training starts from, by its seed."""

    state: State
    frozen: Any
    batches: Sequence[Batch]


class Task(NamedTuple):
    """A training but for its learning rate and its seed."""

    updates: int
    micro_batches: int
    loss: Loss
    optimizer: Callable[[jax.typing.ArrayLike], optax.GradientTransformation]
    """By its peak learning rate, which may be traced."""
    start: Callable[[int], Start]
    judge: Callable[[Any, Any], dict[str, float]]
    """Metrics of params and frozen at the end; "validation_loss" among them."""


class Sources:
    """The data of a grid, made once."""

    def __init__(
        self,
        settings: dict[str, Any],
        data_dir: pathlib.Path,
        corpus_dir: pathlib.Path | None,
    ):
        """Loads or makes the corpus, or the pairs of a fine-tuning."""
        self.settings = settings
        if settings.get("sketched_gradients"):
            raise ConfigError(
                "`sketched_gradients` of the grid changes no loss; leave it out, or "
                "train with it by python -m experiments"
            )
        self.config: Config | FinetuneConfig
        self.data: Data | Prepared
        if "dataset" in settings:
            fields = dict(settings)
            if "checkpoint" in fields:
                fields["checkpoint"] = pathlib.Path(fields["checkpoint"])
            self.config = FinetuneConfig(**fields, data_dir=data_dir)
            self.data = prepare(self.config)
        else:
            fields = dict(settings)
            self.dense_rate = fields.pop("dense_learning_rate", None)
            self.config = config_of(fields)
            places = {"data_dir": data_dir, "corpus_dir": corpus_dir}
            self.data = corpora.load(dataclasses.replace(self.config, **places))

    @property
    def fingerprint(self) -> str:
        """Identifies the data."""
        return self.data.fingerprint

    def task(self, cell: Cell) -> Task:
        """Returns the training of a cell."""
        if isinstance(self.config, FinetuneConfig):
            return _finetuning(cell, self.config, self.data)
        return _pretraining(cell, self.config, self.dense_rate, self.data)


def config_of(settings: dict[str, Any]) -> Config:
    """Returns the settings that all pretrainings of a grid share."""
    fields = dict(settings)
    model = GPT2Config(**fields.pop("model", {}))
    return Config(model=model, **fields)


def _pretraining(
    cell: Cell, config: Config, dense_rate: float | None, data: Data
) -> Task:
    """Next-token prediction on the corpus, from random numbers.

    With `dense_rate`, the peak rate of an Adam for everything but the matrices, which
    is the same for all methods: they then differ in what they do to the matrices only.
    """
    name, options = cell["method"], cell.get("options", {})
    own = {key: cell[key] for key in ("projection", "rank") if key in cell}
    if name not in FAMILY:
        own |= options
    config = dataclasses.replace(config, learning_rate=1.0, **own)
    config.validate()
    if config.model.dropout:
        raise ConfigError("a grid trains without dropout; leave it out of the settings")
    method = METHODS.get(_ALIASES.get(name, name))
    if method is not None and dense_rate is not None:
        raise ConfigError(
            f"`dense_learning_rate` is for the optimizers of the family, got method "
            f"{name!r}; leave it out"
        )
    schedule = methods.schedule(config, name)

    def unit(seed: int) -> optax.GradientTransformation:
        """At a peak of 1: updates are linear in the learning rate."""
        if method is not None:
            seeded = dataclasses.replace(config, seed=seed)
            kept = method.accumulation, method.momentum
            return optimizers.make(
                optimizers.recipe(seeded, config.rank, *kept), schedule
            )
        b2 = cell.get("b2", 0.999)
        setting = family.Setting(config.rank, config.resample_every, seed, b2, options)
        return FAMILY[name].make(schedule, setting)

    def optimizer(
        rate: jax.typing.ArrayLike, seed: int = 0
    ) -> optax.GradientTransformation:
        tx = optax.chain(unit(seed), optax.scale(rate))
        if dense_rate is None:
            return tx
        rest = optax.adam(lambda count: dense_rate * schedule(count), b2=0.99)
        return optax.partition({True: tx, False: rest}, family.matrices)

    def divided(seed: int) -> tuple[Any, Any, Any]:
        graphdef, params = create(config.model, seed)
        if method is None or not method.adapters:
            return graphdef, params, {}
        graphdef, params = lora.add(graphdef, params, config.rank, config.rank, seed)
        return graphdef, *lora.divide(params, tune_rest=True)

    def start(seed: int) -> Start:
        _, trained, frozen = divided(seed)
        state = State(trained, optimizer(1.0, seed).init(trained))
        return Start(state, frozen, batches(data, config.batch_size, seed))

    problem = training.problem(config, data, divided(0)[0])
    return Task(
        updates=config.updates,
        micro_batches=1 if method is None else method.micro_batches(config),
        loss=problem.loss,
        optimizer=optimizer,
        start=start,
        judge=problem.evaluate,
    )


def _finetuning(cell: Cell, config: FinetuneConfig, prepared: Prepared) -> Task:
    """One of the methods of a fine-tuning; its output is decoded and scored."""
    name, rank = cell["method"], cell.get("rank")
    config = dataclasses.replace(
        config, learning_rate=1.0, lora_learning_rate=1.0, **cell.get("options", {})
    )
    config.validate()
    if config.dropout:
        raise ConfigError("a grid trains without dropout; leave it out of the settings")

    def built(seed: int) -> tuple[Any, State, Any]:
        data = prepared
        if config.checkpoint is None:
            data = prepared._replace(params=create(prepared.model, seed)[1])
        return build(dataclasses.replace(config, seed=seed), data, name, rank)

    def start(seed: int) -> Start:
        problem, (params, state), _ = built(seed)
        chained = state, optax.scale(1.0).init(params)
        return Start(State(params, chained), problem.frozen, problem.batches)

    problem, _, tx = built(0)

    def judge(trained: Any, frozen: Any) -> dict[str, float]:
        params = lora.join(trained, frozen)
        if METHODS[name].adapters:
            params = lora.merge(params, rank, config.alpha(rank))
        scores, _ = decode_and_score(config, prepared, params)
        return problem.evaluate(trained, frozen) | scores

    return Task(
        updates=config.updates,
        micro_batches=METHODS[name].micro_batches(config),
        loss=problem.loss,
        optimizer=lambda rate: optax.chain(tx, optax.scale(rate)),
        start=start,
        judge=judge,
    )
