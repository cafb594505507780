"""The settings that every training job has, and which of them make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, Literal, get_args, get_origin, get_type_hints

from experiments.common.errors import ConfigError, flag
from experiments.common.methods import FINETUNE, METHODS, PROJECTIONS, Method
from experiments.common.report import ranked

MethodName = Literal[FINETUNE]
Estimator = Literal["paper", "nesterov", "fresh", "residual"]
Projection = Literal[PROJECTIONS]

# Fields that say where things lie or how much of the job to do now. Every other field
# changes the numbers of a run, so that a run that continues has to agree on it.
_NOT_PART_OF_A_RUN = frozenset(
    {
        "methods",
        "ranks",
        "output_dir",
        "data_dir",
        "corpus_dir",
        "download",
        "checkpoint_every",
        "overwrite",
        "stop_after",
        "samples",
        "eval_datasets",
        "beams",
        "decode_examples",
        "learning_rate",
        "lora_learning_rate",
    }
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JobConfig:
    """Settings that pretraining and fine-tuning have in common."""

    methods: tuple[MethodName, ...]
    """Methods to compare. Accumulation splits the batch in --micro-batches parts; the
    others see it at once."""
    ranks: tuple[int, ...]
    """Ranks of FLORA's sketches and of LoRA's adapters; a run for each."""
    optimizer: Literal["adafactor", "adam", "sgd"] = "adafactor"
    """The base optimizer."""
    learning_rate: float
    """Peak learning rate; with adafactor relative to the RMS of each parameter."""
    lora_learning_rate: float | None = None
    """Peak learning rate of the LoRA methods; three times the other if not given."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha/rank; the rank if not given."""
    lora_tune_rest: bool = True
    """Train biases, norms and embeddings along with the adapters; False freezes them,
    which leaves a model from scratch with random embeddings."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After a linear warm-up: a cosine to a tenth of the peak, or constant."""
    warmup_fraction: float = 0.1
    """Fraction of the updates that warm up."""
    updates: int
    """Parameter updates of each run."""
    batch_size: int
    """Examples in one update, on all devices and hosts together."""
    micro_batches: int
    """Equal parts in which the accumulation methods see a batch."""
    momentum: float = 0.9
    """Decay of the momentum; of Adam's first moment."""
    resample_every: int | None
    """Updates between two projections of FLORA's momentum; None keeps the first."""
    estimator: Estimator = "paper"
    """How FLORA's momentum becomes an update."""
    projection: Projection = "CountSketch"
    """How matrices are sketched; Gaussian is the paper's."""
    eval_every: int
    """Updates between two validation losses."""
    eval_examples: int
    """Examples of the validation split that are used, spread over it."""
    checkpoint_every: int
    """Updates between two checkpoints; the last update always makes one."""
    seed: int = 0
    """Seed of parameters, adapters, data order, dropout and projections."""
    output_dir: pathlib.Path
    """Where metrics, checkpoints and results go. The same command continues from the
    last checkpoint that it finds there."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where prepared data sets are kept for the next run."""
    overwrite: bool = False
    """Delete the runs of these methods and ranks in the output directory, and start
    again."""
    stop_after: int | None = None
    """Stop each run after this update, with a checkpoint to continue from."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        check_choices(self)
        check_at_least(self, ("ranks", "updates", "batch_size", "micro_batches"))
        check_at_least(self, ("resample_every", "eval_every", "eval_examples"))
        check_at_least(self, ("checkpoint_every",))
        check_at_least(self, ("seed",), least=0)
        positive = ("learning_rate", "lora_learning_rate", "lora_alpha")
        check(self, positive, "positive and finite", lambda x: 0 < x < math.inf)
        check_fractions(self, ("momentum", "warmup_fraction"))
        for name in ("methods", "ranks"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise ConfigError(
                    f"`--{name}` must name at least one, each once, got "
                    f"{' '.join(map(str, values))!r}"
                )
        for name in self.methods:
            if self.batch_size % METHODS[name].micro_batches(self):
                raise ConfigError(
                    f"`--micro-batches` must divide `--batch-size` ({self.batch_size}) "
                    f"for {name}, got {self.micro_batches}"
                )
            if self.optimizer == "adam" and METHODS[name].kind == "momentum":
                raise ConfigError(
                    f"`--methods` got {name}, but `--optimizer adam` has a momentum of "
                    "its own; use adafactor or sgd, or the other methods"
                )
        oblique = self.projection in ("Gaussian", "Rademacher")
        if self.estimator == "residual" and oblique:
            raise ConfigError(
                "`--estimator residual` needs a projection with orthogonal rows, got "
                f"`--projection` {self.projection}; use CountSketch, Orthogonal or SRHT"
            )
        if self.stop_after is not None and not 1 <= self.stop_after <= self.updates:
            raise ConfigError(
                f"`--stop-after` must be between 1 and `--updates` ({self.updates}), "
                f"got {self.stop_after}"
            )

    def peak(self, method: str) -> float:
        """Returns the peak learning rate of a method."""
        if not METHODS[method].adapters:
            return self.learning_rate
        return self.lora_learning_rate or 3 * self.learning_rate


@dataclasses.dataclass(frozen=True)
class Run:
    """A method of a job, at a rank if it has one."""

    config: JobConfig
    name: str
    rank: int | None

    @property
    def method(self) -> Method:
        """The method."""
        return METHODS[self.name]

    @property
    def title(self) -> str:
        """Its name on the screen and in tables."""
        return ranked(self.method.title, self.rank)

    @property
    def folder(self) -> pathlib.Path:
        """Where its metrics and checkpoints are kept."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        return self.config.output_dir / (self.name + rank)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings, by flag, that decide its numbers."""
        fields = {"learning_rate": self.config.peak(self.name)}
        for name, value in dataclasses.asdict(self.config).items():
            if isinstance(value, dict):
                fields |= {f"{name}.{key}": part for key, part in value.items()}
            elif name not in _NOT_PART_OF_A_RUN:
                is_path = isinstance(value, pathlib.Path)
                fields[name] = str(value) if is_path else value
        flags = {flag(name): value for name, value in fields.items()}
        return flags | {"method": self.name, "rank": self.rank}


def check(
    config: Any, names: Iterable[str], wanted: str, is_right: Callable[..., bool]
) -> None:
    """Refuses values, or members of a tuple of values.

    Args:
        config: the settings.
        names: the fields; a value of None is not checked.
        wanted: what they must be, in words.
        is_right: whether a value is that.
    """
    for name in names:
        value = getattr(config, name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and not is_right(item):
                raise ConfigError(f"`{flag(name)}` must be {wanted}, got {item!r}")


def check_choices(config: Any) -> None:
    """Refuses values that are not among the choices of a field.

    The command line has seen to that; a program that makes the settings has not.
    """
    for name, kind in get_type_hints(type(config)).items():
        one_of = get_args(kind)[0] if get_origin(kind) is tuple else kind
        if get_origin(one_of) is Literal:
            choices = get_args(one_of)
            wanted = f"one of {', '.join(choices)}"
            check(config, (name,), wanted, choices.__contains__)


def check_some(config: Any) -> None:
    """Refuses tuples that are empty."""
    for name, value in vars(config).items():
        if value == ():
            raise ConfigError(f"`{flag(name)}` must name at least one, got none")


def check_at_least(config: Any, names: Iterable[str], least: int = 1) -> None:
    """Refuses numbers that are too small.

    Args:
        config: the settings.
        names: the fields; a value of None is not checked.
        least: the smallest number that is accepted.
    """
    wanted = f"at least {least}" if least else "non-negative"
    check(config, names, wanted, lambda x: x >= least)


def check_fractions(config: Any, names: Iterable[str]) -> None:
    """Refuses numbers outside [0, 1).

    Args:
        config: the settings.
        names: the fields; a value of None is not checked.
    """
    check(config, names, "in [0, 1)", lambda x: 0 <= x < 1)
