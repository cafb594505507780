"""What one cell of a grid trains, and its runs, by learning rate and seed."""

import dataclasses
import functools
import pathlib
import statistics
import time
from typing import Any

import jax
import numpy as np
import optax

import flora_jax as fj
from experiments.common import loop, lora, problem, records, spectra
from experiments.common.checkpoints import State
from experiments.common.config import JobConfig
from experiments.common.errors import ConfigError
from experiments.common.methods import METHODS, matrices, settings_of
from experiments.common.problem import Data, Problem
from experiments.common.state_bytes import step_bytes, tree_bytes
from experiments.finetune import evaluate, prepare
from experiments.finetune.config import Config as FinetuneConfig
from experiments.main_job import run as main_job
from experiments.main_job.config import Config
from experiments.models.build import Params, create
from experiments.models.config import GPT2Config, LlamaConfig
from experiments.sweep.config import Cell

_FAMILIES = {"gpt2": GPT2Config, "llama": LlamaConfig}


class Task:
    """A run but for its learning rate and its seed."""

    def __init__(
        self, config: JobConfig, dense_rate: float | None, data: Data, cell: Cell
    ):
        """Checks the settings.

        Args:
            config: what all cells share.
            dense_rate: learning rate of an Adam for everything but the matrices, so
                that all methods differ in what they do to the matrices only.
            data: what it trains on.
            cell: the rest.

        Raises:
            ConfigError: the settings make no sense.
        """
        self._name, self._rank = cell["method"], cell.get("rank")
        self.method, self._data = METHODS[self._name], data
        # Of bfloat16 parameters: to nearest, or at random; None keeps them in float32.
        self._rounding = cell.get("options", {}).get("rounding")
        if self._rounding not in (None, "nearest", "stochastic"):
            raise ConfigError(
                "`rounding` of the parameters must be nearest or stochastic, got "
                f"{self._rounding!r}; leave it out for float32 parameters"
            )
        self.config, self._settings = split(config, cell)
        self.config.validate()
        accumulates = self.method.kind == "accumulation"
        if dense_rate is not None and (accumulates or self.method.adapters):
            raise ConfigError(
                "`dense_learning_rate` is for optimizers that neither accumulate nor "
                f"train adapters, got method {self._name!r}; leave it out"
            )
        self._dense_rate = dense_rate

    def optimizer(
        self, learning_rate: jax.typing.ArrayLike, seed: int = 0
    ) -> optax.GradientTransformation:
        """Returns the optimizer.

        Args:
            learning_rate: the peak, which may be traced.
            seed: of the projections.
        """
        # At a peak of 1: updates are linear in the learning rate.
        schedule = problem.learning_rate(self.config, self._name)
        settings = settings_of(self.config, self._rank, seed, **self._settings)
        direction = self.method.optimizer(schedule, settings)
        tx = optax.chain(direction, optax.scale(learning_rate))
        if self._dense_rate is None:
            return tx
        rest = optax.adam(lambda count: self._dense_rate * schedule(count), b2=0.99)
        return optax.partition({True: tx, False: rest}, matrices)

    def start(self, seed: int) -> tuple[Problem, State]:
        """Returns what is trained, and its state."""
        data, config = self._data, dataclasses.replace(self.config, seed=seed)
        if not data.pretrained:
            data = dataclasses.replace(data, params=create(data.model, seed)[1])
        made, (params, _), _ = problem.build(config, data, self._name, self._rank)
        opt_state = self.optimizer(1.0, seed).init(params)
        if self._rounding is not None:
            params = optax.tree.cast(params, "bfloat16")
        return made, State(params, opt_state)

    def apply_updates(self, params: Params, updates: Params, key: jax.Array) -> Params:
        """Returns the new parameters, rounded as the cell says."""
        if self._rounding == "stochastic":
            return fj.apply_updates(params, updates, key)
        return optax.apply_updates(params, updates)

    def judge(self, made: Problem, state: State) -> dict[str, float]:
        """Returns metrics at the end; "validation_loss" among them."""
        scores = made.evaluate(state.params, made.frozen)
        if not isinstance(self._data, prepare.Prepared):
            return {"validation_loss": scores["validation_loss"]}
        params = made.merged(state.params, made.frozen)
        scores |= evaluate.evaluate(self.config, self._data, params)[0]
        if self._data.eval_datasets and self._data.pretrained:
            # What happened to the weights.
            changed = list(spectra.changes(self._data.params, params).values())
            for name in ("effective_rank", "intruders", "relative_change"):
                scores[name] = statistics.mean(each[name] for each in changed)
        return scores


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
            self._data = prepare.prepare(self._config)
        else:
            self._config = dataclasses.replace(self._config, corpus_dir=corpus_dir)
            self._data = main_job.prepare(self._config)
        if self._data.model.dropout:
            raise ConfigError("a grid trains without dropout; leave it out of settings")
        self.fingerprint = self._data.fingerprint

    def task(self, cell: Cell) -> Task:
        """Returns what a cell trains."""
        return Task(self._config, self._dense_rate, self._data, cell)


def config_of(settings: dict[str, Any]) -> tuple[JobConfig, float | None]:
    """Returns the settings that all runs of a grid share, and `dense_learning_rate`."""
    fields = dict(settings)
    dense_rate = fields.pop("dense_learning_rate", None)
    if "dataset" not in fields:
        sizes = dict(fields.pop("model", {}))
        family = sizes.pop("family", "gpt2")
        if family not in _FAMILIES:
            raise ConfigError(
                f"`family` of the model must be of {', '.join(_FAMILIES)}, got "
                f"{family!r}"
            )
        model = _FAMILIES[family](**sizes)
        # A grid says where it departs from the paper; the main job's default does.
        fields = {"estimator": "paper"} | fields
        return Config(model=model, **fields), dense_rate
    if "checkpoint" in fields:
        fields["checkpoint"] = pathlib.Path(fields["checkpoint"])
    return FinetuneConfig(**fields), dense_rate


def split(config: JobConfig, cell: Cell) -> tuple[JobConfig, dict[str, Any]]:
    """Divides a cell between the settings of the job and those of its method.

    An option that the job has a setting of that name for replaces it; the others, but
    for `rounding`, are arguments of the optimizer. Without a projection each method has
    its own.
    """
    fields = {field.name for field in dataclasses.fields(config)} - {"projection"}
    of_job: dict[str, Any] = {}
    options = {"projection": cell.get("projection")}
    for name, value in cell.get("options", {}).items():
        if name in fields:
            of_job[name] = value
        elif name != "rounding":
            options[name] = value
    of_job |= {"learning_rate": 1.0, "lora_learning_rate": 1.0}
    of_job["ranks"] = (cell.get("rank", 1),)
    config = dataclasses.replace(config, **of_job)
    return config, {"options": options, "b2": cell.get("b2", 0.999)}


class Bench:
    """The compiled step of one cell; the learning rate is its argument."""

    def __init__(self, task: Task):
        """Compiles the step."""
        self._task = task
        self._parts = task.method.micro_batches(task.config)
        made, state = task.start(0)
        # The state is that of float32 parameters, however they are kept.
        full = optax.tree.cast(state.params, "float32")
        self._bytes = measure(task.optimizer(1.0, 0), full)

        def step(
            state: State, frozen: Any, batch: Any, learning_rate: float, key: jax.Array
        ) -> Any:
            tx = task.optimizer(learning_rate, 0)
            apply = functools.partial(task.apply_updates, key=key)
            return loop.training_step(made, tx, state, frozen, batch, key, apply)

        started = time.perf_counter()
        part = problem.micro_batches(made.batches[0], self._parts)[0]
        jitted = jax.jit(step, donate_argnums=0)
        key = _key(0, 0)
        self._compiled = jitted.lower(state, made.frozen, part, 0.1, key).compile()
        self._compile_seconds = time.perf_counter() - started

    def train(self, learning_rate: float, seed: int) -> dict[str, Any]:
        """Trains once; losses are None if it diverged."""
        made, state = self._task.start(seed)
        losses, seconds = [], []
        for number in range(self._task.config.updates):
            parts = problem.micro_batches(made.batches[number], self._parts)
            started = time.perf_counter()
            total = 0.0
            for part in parts:
                state, loss = self._compiled(
                    state, made.frozen, part, learning_rate, _key(seed, number)
                )
                total += float(loss)
            losses.append(total / self._parts)
            seconds.append(time.perf_counter() - started)
        scores = self._task.judge(made, state)
        return {
            "train_loss": records.finite(records.final_loss(losses)),
            **{name: records.finite(score) for name, score in scores.items()},
            "step_seconds": statistics.median(seconds),
            "compile_seconds": self._compile_seconds,
            "trained_bytes": tree_bytes(state.params),
            "state_bytes": self._bytes[0],
            "matrix_bytes": self._bytes[1],
            "step_bytes": step_bytes(self._compiled),
        }


def _key(seed: int, number: int) -> np.ndarray:
    """Key data of an update; there is no dropout, only rounding."""
    return np.array([seed, number], np.uint32)


def measure(tx: optax.GradientTransformation, params: Params) -> tuple[int, int]:
    """Counts the bytes of a state, and those of the matrices alone; allocates nothing.

    Args:
        tx: the optimizer.
        params: what it trains, or the shapes.

    Returns:
        Bytes of the whole state, and of the state for the matrices alone: those that
        may be sketched, or LoRA's adapters in their place.
    """
    chosen, flat = map(jax.tree_util.tree_leaves_with_path, (matrices(params), params))
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for (path, leaf), (_, own) in zip(flat, chosen, strict=True)
        if own or path[-1].key in lora.ADAPTERS
    }
    state, of_matrices = (jax.eval_shape(tx.init, tree) for tree in (params, flat))
    return tree_bytes(state), tree_bytes(of_matrices)
