"""One training from its start, or its last checkpoint, to its summary."""

import pathlib
from typing import Any

import flora_jax as fj
from experiments import gpt2, memory, methods, records
from experiments.checkpoints import Checkpoints, State
from experiments.config import Config
from experiments.data import Data
from experiments.display import Display
from experiments.methods import METHODS
from experiments.train import Trainer


class Training:
    """A training that goes on by one update when it is told to.

    So several can take turns, and what else the machine does slows all of them alike.
    """

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
        method = METHODS[name]
        tx = methods.optimizer(config, name)
        graphdef, params = gpt2.create(config.model, config.seed)
        self._state = State(params, tx.init(params))
        self._bytes = memory.measure(method, config, *self._state)
        self._config = config
        self._folder = folder
        self._kept = Checkpoints(
            folder / "checkpoints", identity(config, name, dataset)
        )
        self._trainer = Trainer(method, config, dataset, graphdef, tx)
        self._done = self._restore(tx)
        self._metrics = records.MetricsFile(
            folder / "metrics.jsonl", keep_until=self._done
        )
        self._bar = display.add(method.title, config.updates, max(self._done, 0))
        self._trainer.compile(self._state)
        if self._done < 0:
            self._done = 0
            loss = self._trainer.validation_loss(self._state)
            self._metrics.append({"update": 0, "tokens": 0, "validation_loss": loss})

    def _restore(self, tx: Any) -> int:
        """Returns the number of updates done, -1 for a new training."""
        if not self._config.resume or self._kept.latest() is None:
            return -1
        done, self._state = self._kept.restore(self._state)
        if self._trainer.method.compressed:
            fj.verify_state(tx, self._state.opt_state)
        return done

    def advance(self, number: int) -> None:
        """Does update `number`, counted from 1, unless a checkpoint holds it already.

        Raises:
            NonFiniteLossError: the loss is infinite or no number.
        """
        if number <= self._done:
            return
        config = self._config
        self._state, row = self._trainer.update(self._state, number)
        if number % config.eval_every == 0 or number == config.updates:
            row["validation_loss"] = self._trainer.validation_loss(self._state)
        self._metrics.append(row)  # before the checkpoint, which vouches for it
        last = number in (config.updates, config.stop_after)
        if number % config.checkpoint_every == 0 or last:
            self._kept.save(number, self._state)
        self._done = number
        self._bar.show(row)

    def close(self) -> None:
        """Closes the checkpoints."""
        self._kept.close()

    def finish(self) -> records.Summary | None:
        """Writes and returns the summary; None if there are updates to come."""
        if self._done < self._config.updates:
            return None
        summary = self._summarize()
        records.write_json(self._folder / "summary.json", summary.as_json())
        return summary

    def _summarize(self) -> records.Summary:
        trainer, config, rows = self._trainer, self._config, self._metrics.rows
        method = trainer.method
        step_seconds = records.median_seconds(rows)
        return records.Summary(
            method=method.name,
            title=method.title,
            kind=method.kind,
            compressed=method.compressed,
            learning_rate=config.peak_learning_rate(method.name),
            updates=config.updates,
            micro_batches=trainer.parts,
            tokens_per_update=trainer.tokens_per_update,
            train_loss=records.final_train_loss(rows),
            validation_loss=records.last_validation_loss(rows),
            step_seconds=step_seconds,
            tokens_per_second=trainer.tokens_per_update / step_seconds,
            compile_seconds=trainer.compile_seconds,
            step_peak_bytes=trainer.peak_bytes,
            bytes=self._bytes,
            metrics=tuple(rows),
        )


def identity(config: Config, name: str, dataset: Data) -> dict[str, Any]:
    """Returns what has to agree for a checkpoint to be continued."""
    return config.identity(name) | {"the corpus": dataset.fingerprint}
