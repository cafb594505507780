"""What the main job is made of, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import pathlib

from experiments.common.config import Estimator, JobConfig, MethodName
from experiments.common.errors import ConfigError
from experiments.common.methods import MAIN
from experiments.models.config import GPT2Config, validate

# A byte-level vocabulary has the 256 bytes and the end-of-text token.
SMALLEST_VOCABULARY = 257


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(JobConfig):
    """All settings of the main job; the defaults are the job of the README."""

    methods: tuple[MethodName, ...] = MAIN
    ranks: tuple[int, ...] = (32, 128)
    learning_rate: float = 0.1
    updates: int = 100
    batch_size: int = 4
    micro_batches: int = 4
    resample_every: int | None = 50
    estimator: Estimator = "nesterov"
    eval_every: int = 25
    eval_examples: int = 32
    checkpoint_every: int = 50
    output_dir: pathlib.Path = pathlib.Path("runs/default")
    corpus_dir: pathlib.Path | None = None
    """Folder of Python sources to train on, in place of the standard library."""
    model: GPT2Config = GPT2Config(layers=2, vocab_size=2048)

    def validate(self) -> None:
        """Refuses settings that make no sense, see `JobConfig.validate`."""
        super().validate()
        validate(self.model)
        if self.model.vocab_size < SMALLEST_VOCABULARY:
            raise ConfigError(
                f"`--model.vocab-size` must be at least {SMALLEST_VOCABULARY} (the "
                f"bytes and the end of text), got {self.model.vocab_size}"
            )
        if max(self.ranks) >= self.model.width:
            raise ConfigError(
                f"`--ranks` must be below `--model.width` ({self.model.width}) to "
                f"compress anything, got {max(self.ranks)}"
            )
