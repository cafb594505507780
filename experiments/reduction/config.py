"""What is averaged over devices, and how. Nothing here imports jax."""

import dataclasses
import pathlib

from experiments.common.config import check_some
from experiments.main_job.config import Config as MainConfig
from experiments.models.config import GPT2Config


@dataclasses.dataclass(frozen=True)
class Config:
    """Each way is trained at all learning rates with all seeds; its best one counts."""

    ranks: tuple[int, ...] = (32, 128)
    """Ranks of the sketches."""
    learning_rates: tuple[float, ...] = (0.03, 0.1, 0.3)
    """Peaks for Adafactor with momentum, relative to the RMS of each parameter."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of parameters, data order and projections."""
    updates: int = 120
    """Updates of each run."""
    batch_size: int = 8
    """Packed examples of one update; a multiple of the number of devices."""
    eval_every: int = 20
    """Updates between two points of a curve."""
    eval_examples: int = 96
    """Packed examples in the fixed validation set."""
    model: GPT2Config = GPT2Config(layers=2)
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where the tokenizer and the packed examples are kept."""
    corpus_dir: pathlib.Path | None = None
    """Folder of Python sources to train on, in place of the standard library."""
    output_dir: pathlib.Path = pathlib.Path("runs/reduction")
    """Where reduction.jsonl, table and picture go; runs that stand there are not run
    again."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        check_some(self)
        self.job().validate()

    def job(self) -> MainConfig:
        """Returns the settings of the main job that these runs share.

        Updates are linear in the learning rate, which is an argument of the step.
        """
        names = ("ranks", "updates", "batch_size", "eval_every", "eval_examples")
        names += ("model", "data_dir", "corpus_dir")
        shared = {name: getattr(self, name) for name in names}
        own = {"learning_rate": 1.0, "micro_batches": 1}
        return MainConfig(methods=("full_momentum",), **own, **shared)
