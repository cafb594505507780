"""What one cell of a grid trains: the model, the optimizer, the data, the verdict."""

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from experiments.common import lora, problem
from experiments.common.checkpoints import State
from experiments.common.errors import ConfigError
from experiments.common.methods import METHODS, Method, matrices, settings_of
from experiments.common.problem import Problem
from experiments.finetune.config import Config as FinetuneConfig
from experiments.finetune.evaluate import evaluate as decode_and_score
from experiments.finetune.prepare import Prepared
from experiments.finetune.prepare import prepare as prepare_pairs
from experiments.main_job.config import Config
from experiments.main_job.prepare import prepare as prepare_corpus
from experiments.models.build import create
from experiments.models.config import GPT2Config
from experiments.sweep.grid import Cell


class Task(NamedTuple):
    """A run but for its learning rate and its seed."""

    method: Method
    config: Config | FinetuneConfig
    optimizer: Callable[[jax.typing.ArrayLike, int], optax.GradientTransformation]
    """By its peak learning rate, which may be traced, and the seed of projections."""
    start: Callable[[int], tuple[Problem, State]]
    """By the seed."""
    judge: Callable[[Problem, State], dict[str, float]]
    """Metrics at the end; "validation_loss" among them."""


class Sources:
    """The data of a grid, made once."""

    def __init__(
        self,
        settings: dict[str, Any],
        data_dir: pathlib.Path,
        corpus_dir: pathlib.Path | None,
    ):
        """Loads or makes the corpus, or the pairs of a fine-tuning."""
        self._config, self._dense_rate = config_of(settings)
        self._config = dataclasses.replace(self._config, data_dir=data_dir)
        if isinstance(self._config, FinetuneConfig):
            self._data = prepare_pairs(self._config)
        else:
            self._config = dataclasses.replace(self._config, corpus_dir=corpus_dir)
            self._data = prepare_corpus(self._config)
        if self._data.model.dropout:
            raise ConfigError("a grid trains without dropout; leave it out of settings")

    @property
    def fingerprint(self) -> str:
        """Identifies the data."""
        return self._data.fingerprint

    def task(self, cell: Cell) -> Task:
        """Returns what a cell trains.

        With a dense learning rate, that of an Adam for everything but the matrices, all
        methods differ in what they do to the matrices only.
        """
        name, rank, data = cell["method"], cell.get("rank"), self._data
        method, dense_rate = METHODS[name], self._dense_rate
        config, settings = split(self._config, cell)
        config.validate()
        if dense_rate is not None and (
            method.kind == "accumulation" or method.adapters
        ):
            raise ConfigError(
                "`dense_learning_rate` is for optimizers that neither accumulate nor "
                f"train adapters, got method {name!r}; leave it out"
            )
        schedule = problem.learning_rate(config, name)

        def optimizer(
            rate: jax.typing.ArrayLike, seed: int = 0
        ) -> optax.GradientTransformation:
            # At a peak of 1: updates are linear in the learning rate.
            tx = method.optimizer(schedule, settings_of(config, rank, seed, **settings))
            tx = optax.chain(tx, optax.scale(rate))
            if dense_rate is None:
                return tx
            rest = optax.adam(lambda count: dense_rate * schedule(count), b2=0.99)
            return optax.partition({True: tx, False: rest}, matrices)

        def start(seed: int) -> tuple[Problem, State]:
            own = data
            if getattr(config, "checkpoint", None) is None:
                own = dataclasses.replace(data, params=create(data.model, seed)[1])
            seeded = dataclasses.replace(config, seed=seed)
            made, (params, _), _ = problem.build(seeded, own, name, rank)
            return made, State(params, optimizer(1.0, seed).init(params))

        def judge(made: Problem, state: State) -> dict[str, float]:
            scores = made.evaluate(state.params, made.frozen)
            if not isinstance(data, Prepared):
                return {"validation_loss": scores["validation_loss"]}
            params = lora.join(state.params, made.frozen)
            if method.adapters:
                params = lora.merge(params, rank, config.alpha(rank))
            return scores | decode_and_score(config, data, params)[0]

        return Task(method, config, optimizer, start, judge)


def config_of(
    settings: dict[str, Any],
) -> tuple[Config | FinetuneConfig, float | None]:
    """Returns the settings that all runs of a grid share, and the dense rate."""
    fields = dict(settings)
    dense_rate = fields.pop("dense_learning_rate", None)
    if "dataset" not in fields:
        model = GPT2Config(**fields.pop("model", {}))
        # A grid says where it departs from the paper; the main job's default does.
        fields = {"estimator": "paper"} | fields
        return Config(model=model, **fields), dense_rate
    if "checkpoint" in fields:
        fields["checkpoint"] = pathlib.Path(fields["checkpoint"])
    return FinetuneConfig(**fields), dense_rate


def split(
    config: Config | FinetuneConfig, cell: Cell
) -> tuple[Config | FinetuneConfig, dict[str, Any]]:
    """Divides a cell between the settings of the job and those of its method.

    An option that the job has a setting of that name for replaces it; the others are
    arguments of the optimizer. Without a projection each method has its own.
    """
    names = {field.name for field in dataclasses.fields(config)} - {"projection"}
    options = {"projection": cell.get("projection")} | cell.get("options", {})
    own = {name: options.pop(name) for name in names & set(options)}
    own |= {"learning_rate": 1.0, "lora_learning_rate": 1.0}
    own["ranks"] = (cell.get("rank", 1),)
    config = dataclasses.replace(config, **own)
    return config, {"options": options, "b2": cell.get("b2", 0.999)}
