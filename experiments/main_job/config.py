"""What one run of the experiment is made of, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import math
import pathlib
from typing import Any

from experiments.common.errors import ConfigError, check_projection, flag
from experiments.models.config import GPT2Config, validate

METHODS = (
    "adafactor_momentum",
    "flora_momentum",
    "full_accumulation",
    "flora_accumulation",
)
"""The four trainings, in the order in which they run and are reported."""

READINGS = ("paper", "interpolated", "residual")
"""Readings of the FLORA momentum; "residual" wants CountSketch, Orthogonal or SRHT."""


SMALLEST_VOCABULARY = 257
"""A byte-level vocabulary has the 256 bytes and the end-of-text token."""

# Fields that say where things lie or how much of the job to do now. Every other
# field changes the numbers of a run, so a resumed run has to agree on it.
_NOT_PART_OF_A_RUN = frozenset(
    {
        "methods",
        "output_dir",
        "data_dir",
        "corpus_dir",  # recorded as the fingerprint of what it holds
        "resume",
        "overwrite",
        "stop_after",
        "checkpoint_every",
        "learning_rate",  # recorded as the rate that it resolves to
        "learning_rates",
    }
)


@dataclasses.dataclass(frozen=True)
class LearningRates:
    """Peak learning rates, relative to the root mean square of each parameter."""

    adafactor_momentum: float = 0.1
    """Adafactor with an uncompressed momentum."""
    flora_momentum: float = 0.1
    """FLORA: Adafactor whose momentum is a sketch."""
    full_accumulation: float = 0.1
    """Adafactor behind an uncompressed gradient accumulator."""
    flora_accumulation: float = 0.1
    """Adafactor behind a sketched gradient accumulator."""


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings of the experiment; the defaults are the job of the README."""

    methods: tuple[str, ...] = METHODS
    """Which trainings to run, by name."""
    updates: int = 200
    """Parameter updates in each training."""
    batch_size: int = 12
    """Packed examples that one update sees, in every method."""
    micro_batches: int = 4
    """Equal parts in which the accumulation methods see that batch."""
    rank: int = 32
    """Rows of the projection: what a compressed matrix keeps of its width."""
    momentum: float = 0.9
    """Decay of the momentum, for the two momentum methods."""
    resample_every: int | None = 50
    """Updates between two projections of the FLORA momentum; None keeps the first."""
    reading: str = "paper"
    """How the FLORA momentum becomes an update: paper, interpolated or residual."""
    projection: str = "CountSketch"
    """How matrices are sketched: CountSketch, Gaussian (the paper's), Rademacher,
    Orthogonal or SRHT."""
    sketched_gradients: bool = False
    """FLORA's accumulation takes sketches that automatic differentiation makes: full
    gradients of matrices are never formed."""
    learning_rate: float | None = None
    """Peak learning rate of every method of this run, in place of the ones below."""
    warmup_fraction: float = 0.1
    """Part of the updates that warms up; a cosine to a tenth of the peak follows."""
    seed: int = 0
    """Seed of the initial parameters, the data order and the projections."""
    eval_every: int = 25
    """Updates between two evaluations on the validation set."""
    eval_examples: int = 48
    """Packed examples in the fixed validation set."""
    checkpoint_every: int = 100
    """Updates between two checkpoints; the last update always makes one."""
    output_dir: pathlib.Path = pathlib.Path("runs/default")
    """Where metrics, checkpoints, table and pictures go."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where the tokenizer and the packed examples are kept for the next run."""
    corpus_dir: pathlib.Path | None = None
    """Folder of Python sources to train on, in place of the standard library."""
    resume: bool = False
    """Continue the run in the output directory from its last checkpoints."""
    overwrite: bool = False
    """Delete the trainings that lie in the output directory and start again."""
    stop_after: int | None = None
    """Interrupt each training after this update, with a checkpoint to resume from."""
    model: GPT2Config = dataclasses.field(default_factory=GPT2Config)
    learning_rates: LearningRates = dataclasses.field(default_factory=LearningRates)

    def validate(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        _check_methods(self.methods)
        check_sketched_gradients(self.sketched_gradients, self.methods)
        _check_positive(self)
        _check_fractions(self)
        _check_pairs(self)
        _check_model(self.model, self.rank)

    def peak_learning_rate(self, method: str) -> float:
        """Returns the peak learning rate with which `method` trains."""
        if self.learning_rate is not None:
            return self.learning_rate
        return getattr(self.learning_rates, method)

    def identity(self, method: str) -> dict[str, Any]:
        """Returns the settings, by flag, that decide the numbers of one training."""
        fields = {
            name: value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_PART_OF_A_RUN and name != "model"
        }
        fields |= {
            f"model.{name}": value
            for name, value in dataclasses.asdict(self.model).items()
        }
        fields["learning_rate"] = self.peak_learning_rate(method)
        return {flag(name): value for name, value in fields.items()}


def check_sketched_gradients(wanted: bool, methods: tuple[str, ...]) -> None:
    """Raises ConfigError if no method takes sketches in place of gradients."""
    if wanted and "flora_accumulation" not in methods:
        raise ConfigError(
            "`--sketched-gradients` is for flora_accumulation, got `--methods` "
            f"{' '.join(methods)}; add it, or leave the flag out"
        )


def _check_methods(methods: tuple[str, ...]) -> None:
    known = ", ".join(METHODS)
    if not methods:
        raise ConfigError(f"`--methods` names no training; choose from {known}")
    for method in methods:
        if method not in METHODS:
            raise ConfigError(
                f"`--methods` got {method!r}, which is no method here; "
                f"choose from {known}"
            )
    if len(set(methods)) != len(methods):
        raise ConfigError(
            f"`--methods` names a training twice: {' '.join(methods)}; name each once"
        )


def _check_positive(config: Config) -> None:
    counts = (
        "updates",
        "batch_size",
        "micro_batches",
        "rank",
        "resample_every",
        "eval_every",
        "eval_examples",
        "checkpoint_every",
    )
    for name in counts:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"`{flag(name)}` must be at least 1, got {value}")
    rates = {"learning_rate": config.learning_rate} | {
        f"learning_rates.{name}": value
        for name, value in dataclasses.asdict(config.learning_rates).items()
    }
    for name, value in rates.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(
                f"`{flag(name)}` must be positive and finite, got {value}; "
                "the defaults are 0.1"
            )


def _check_fractions(config: Config) -> None:
    if config.reading not in READINGS:
        raise ConfigError(
            f"`--reading` must be one of {', '.join(READINGS)}, got {config.reading!r}"
        )
    check_projection(config.projection)
    if config.reading == "residual" and config.projection in ("Gaussian", "Rademacher"):
        raise ConfigError(
            f"`--reading residual` wants a projection of orthogonal rows, got "
            f"`--projection` {config.projection}; use CountSketch, Orthogonal or SRHT"
        )
    if not 0 <= config.momentum < 1:
        raise ConfigError(
            f"`--momentum` must be in [0, 1), got {config.momentum}; 0.9 is usual"
        )
    if not 0 <= config.warmup_fraction < 1:
        raise ConfigError(
            f"`--warmup-fraction` must be in [0, 1), got {config.warmup_fraction}; "
            "0.1 warms up for a tenth of the updates"
        )
    if config.seed < 0:
        raise ConfigError(f"`--seed` must not be negative, got {config.seed}")


def _check_pairs(config: Config) -> None:
    if config.batch_size % config.micro_batches:
        divisors = [
            str(n)
            for n in range(1, config.batch_size + 1)
            if config.batch_size % n == 0
        ]
        raise ConfigError(
            f"`--micro-batches` must divide `--batch-size`, got "
            f"{config.micro_batches} and {config.batch_size}; "
            f"use one of {', '.join(divisors)}"
        )
    if config.stop_after is not None and not 1 <= config.stop_after <= config.updates:
        raise ConfigError(
            f"`--stop-after` must be between 1 and `--updates` ({config.updates}), "
            f"got {config.stop_after}"
        )
    if config.resume and config.overwrite:
        raise ConfigError(
            "`--resume` continues a run and `--overwrite` deletes it; give only one"
        )


def _check_model(model: GPT2Config, rank: int) -> None:
    validate(model)
    if model.vocab_size < SMALLEST_VOCABULARY:
        raise ConfigError(
            f"`--model.vocab-size` must be at least {SMALLEST_VOCABULARY} (the bytes "
            f"and the end of text), got {model.vocab_size}"
        )
    if rank >= model.width:
        raise ConfigError(
            f"`--rank` must be below `--model.width` ({model.width}) to compress "
            f"anything, got {rank}; {max(1, model.width // 8)} is an eighth of it"
        )
