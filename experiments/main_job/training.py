"""One of the four trainings of the main job, from its start to its summary."""

import functools
import pathlib
from typing import Any

import jax

from experiments.common import (
    devices,
    gradients,
    loop,
    lora,
    processes,
    records,
    state_bytes,
)
from experiments.common.checkpoints import State
from experiments.common.display import Display
from experiments.common.errors import flag
from experiments.data.packing import Data, batches
from experiments.main_job import methods
from experiments.main_job.config import Config
from experiments.main_job.methods import METHODS
from experiments.models import create, mean_loss


class MethodTraining:
    """The training of one method, and what its summary says."""

    def __init__(
        self,
        name: str,
        config: Config,
        dataset: Data,
        folder: pathlib.Path,
        display: Display,
    ):
        """Starts the training, or takes it up again if `config.resume`.

        Args:
            name: the method, a key of `METHODS`.
            config: the settings.
            dataset: the packed corpus.
            folder: where this training keeps its metrics and checkpoints.
            display: where progress is shown.

        Raises:
            ConfigError: the checkpoint to resume from was made with other settings, or
                nothing would be compressed.
        """
        self._config, self._folder, self.method = config, folder, METHODS[name]
        tx = methods.optimizer(config, name)
        graphdef, params = create(config.model, config.seed)
        state = State(params, tx.init(params))
        self._bytes = state_bytes.measure(self.method, config, *state)
        self.loop = loop.Training(
            self.method.title,
            problem(config, dataset, graphdef)._replace(
                gradient=gradients.of(methods.recipe(config, name))
            ),
            state,
            tx,
            methods.schedule(config, name),
            _pace(config, self.method),
            folder,
            identity(config, name, dataset),
            display,
            rate_flag=flag(f"learning_rates.{name}"),
            resume=config.resume,
        )

    def finish(self) -> records.Summary | None:
        """Returns the summary, which is written; None if there are updates to come."""
        if self.loop.done < self._config.updates:
            return None
        summary = self._summarize()
        if processes.is_first():
            records.write_json(self._folder / "summary.json", summary.as_json())
        return summary

    def _summarize(self) -> records.Summary:
        config, rows, method = self._config, self.loop.metrics.rows, self.method
        step_seconds = records.median_seconds(rows)
        tokens = self.loop.problem.tokens
        return records.Summary(
            method=method.name,
            title=method.title,
            kind=method.kind,
            compressed=method.compressed,
            learning_rate=config.peak_learning_rate(method.name),
            updates=config.updates,
            micro_batches=method.micro_batches(config),
            tokens_per_update=tokens,
            train_loss=records.final_train_loss(rows),
            validation_loss=records.last_validation_loss(rows),
            step_seconds=step_seconds,
            tokens_per_second=tokens / step_seconds,
            compile_seconds=self.loop.compile_seconds,
            step_peak_bytes=self.loop.step_bytes,
            bytes=self._bytes,
            metrics=tuple(rows),
        )


def problem(config: Config, dataset: Data, graphdef: Any) -> loop.Problem:
    """Returns next-token prediction on the packed corpus, all parameters trained."""

    def loss(params: Any, frozen: Any, tokens: jax.Array, key: jax.Array) -> jax.Array:
        key = key if config.model.dropout else None
        return mean_loss(graphdef, lora.join(params, frozen), {"tokens": tokens}, key)

    evaluate = jax.jit(functools.partial(mean_loss, graphdef))

    def validation_loss(params: Any, frozen: Any) -> dict[str, float]:
        params = lora.join(params, frozen)
        total, examples = 0.0, dataset.validation
        for start in range(0, len(examples), config.batch_size):
            chunk = examples[start : start + config.batch_size]
            batch = devices.split({"tokens": chunk})
            total += float(evaluate(params, batch)) * len(chunk)
        return {"validation_loss": total / len(examples)}

    return loop.Problem(
        loss=loss,
        frozen={},
        batches=batches(dataset, config.batch_size, config.seed),
        tokens=config.batch_size * config.model.context,
        evaluate=validation_loss,
    )


def _pace(config: Config, method: methods.Method) -> loop.Pace:
    return loop.Pace(
        updates=config.updates,
        micro_batches=method.micro_batches(config),
        eval_every=config.eval_every,
        checkpoint_every=config.checkpoint_every,
        stop_after=config.stop_after,
        seed=config.seed,
    )


def identity(config: Config, name: str, dataset: Data) -> dict[str, Any]:
    """Returns what has to agree for a checkpoint to be continued."""
    return config.identity(name) | {"the corpus": dataset.fingerprint}
