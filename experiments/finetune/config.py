"""What a fine-tuning is made of, and which settings make no sense.

Nothing here imports jax: `--help` and a refused command line answer at once.
"""

import dataclasses
import math
import pathlib
from typing import Any, Literal

from experiments.common.errors import ConfigError, check_projection, flag
from experiments.main_job.config import check_sketched_gradients

ModelName = Literal[
    "t5-tiny",
    "gpt2-tiny",
    "t5-small",
    "t5-base",
    "t5-large",
    "t5-3b",
    "t5-v1_1-small",
    "t5-v1_1-base",
    "gpt2",
    "gpt2-medium",
    "gpt2-large",
    "gpt2-xl",
]
DatasetName = Literal["docstrings", "phrases", "xsum", "billsum", "iwslt2017", "opus"]
MethodName = Literal[
    "none",
    "full_accumulation",
    "flora_accumulation",
    "lora_accumulation",
    "full_momentum",
    "flora_momentum",
    "lora_momentum",
]

# Fields that say where things lie or how much of the job to do now.
_NOT_PART_OF_A_RUN = frozenset(
    {
        "methods",
        "ranks",
        "output_dir",
        "data_dir",
        "download",
        "checkpoint_every",
        "overwrite",
        "stop_after",
        "samples",
        "beams",
        "decode_examples",
    }
)


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings; the defaults are the offline summarisation."""

    dataset: DatasetName = "docstrings"
    """docstrings and phrases are made on the spot, at the scale of a smoke test;
    billsum and opus are downloaded with --download; xsum and iwslt2017 are fetched by
    hand (the message says how)."""
    model: ModelName = "t5-tiny"
    """A published size, or a tiny one for two cores; from random numbers, unless there
    is a --checkpoint."""
    checkpoint: pathlib.Path | None = None
    """Folder of a Hugging Face checkpoint (config.json, model.safetensors) to start
    from, in place of --model."""
    tokenizer: pathlib.Path | None = None
    """Tokenizer file: spiece.model for T5, tokenizer.json (or a folder with vocab.json
    and merges.txt) for GPT-2. Without one, and without a --checkpoint that has one, a
    tokenizer is trained on the training set."""
    vocab_size: int = 2048
    """Tokens in a tokenizer that is trained."""
    methods: tuple[MethodName, ...] = (
        "none",
        "full_accumulation",
        "flora_accumulation",
        "lora_accumulation",
    )
    """Which trainings to run. Accumulation splits the batch in --micro-batches parts,
    without a momentum; the others see it whole."""
    ranks: tuple[int, ...] = (16,)
    """Ranks of FLORA's sketches and LoRA's adapters; a training for each."""
    optimizer: Literal["adafactor", "adam", "sgd"] = "adafactor"
    """The base optimizer."""
    learning_rate: float = 0.02
    """Peak learning rate; with adafactor relative to each parameter's size."""
    lora_learning_rate: float | None = None
    """Peak learning rate of the LoRA methods; three times the other if not given."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After a linear warm-up: a cosine to a tenth of the peak, or constant."""
    warmup_fraction: float = 0.1
    """Part of the updates that warms up."""
    updates: int = 600
    """Parameter updates of each training."""
    batch_size: int = 32
    """Pairs that one update sees, on all devices and hosts together."""
    micro_batches: int = 16
    """Parts of a batch in the accumulating methods; 16 in the paper."""
    source_length: int = 96
    """Tokens of the input; longer ones are cut."""
    target_length: int = 32
    """Tokens of the output; longer ones are cut."""
    momentum: float = 0.9
    """Decay of the momentum; of Adam's first moment."""
    resample_every: int = 1000
    """Updates between two projections of FLORA's momentum; 1000 in the paper."""
    reading: Literal["paper", "interpolated"] = "paper"
    """How FLORA's momentum becomes an update."""
    projection: str = "CountSketch"
    """How matrices are sketched; Gaussian is the paper's."""
    sketched_gradients: bool = False
    """FLORA's accumulation takes sketches that automatic differentiation makes: full
    gradients of matrices are never formed."""
    lora_alpha: float | None = None
    """Adapters are scaled by alpha/rank; the rank if not given."""
    lora_tune_rest: bool = True
    """Train biases, norms and embeddings beside the adapters; False freezes them, which
    leaves a model from random numbers with random embeddings."""
    dropout: float = 0.0
    """Dropout rate."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the computation; parameters stay float32."""
    remat: bool = False
    """Compute activations of each block again in the backward pass."""
    scan: bool = False
    """Stack the layers and scan over them: compiles faster."""
    eval_every: int = 150
    """Updates between two validation losses."""
    eval_examples: int = 256
    """Pairs of the validation set that are used, spread over it."""
    decode_examples: int = 256
    """Pairs of the test set that are decoded at the end, spread over it."""
    beams: int = 1
    """Beams of the decoding; 1 is greedy."""
    samples: int = 3
    """Decoded outputs that are shown."""
    checkpoint_every: int = 200
    """Updates between two checkpoints; the last update always makes one."""
    seed: int = 0
    """Seed of parameters, adapters, data order, dropout and projections."""
    output_dir: pathlib.Path = pathlib.Path("runs/finetune")
    """Where metrics, checkpoints, trained models and results go. The same command goes
    on from the last checkpoint that it finds there."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where data sets are kept."""
    download: bool = False
    """Allow the data set to be downloaded."""
    overwrite: bool = False
    """Delete the trainings of these methods and ranks that lie in the output directory,
    and start again."""
    stop_after: int | None = None
    """Stop each training after this update, with a checkpoint to go on from."""

    def validate(self) -> None:
        """Refuse settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        _check_counts(self)
        _check_numbers(self)
        _check_methods(self)
        check_projection(self.projection)
        check_sketched_gradients(self.sketched_gradients, self.methods)

    def rate(self, method: str) -> float:
        """Returns the peak learning rate of a method."""
        if not method.startswith("lora"):
            return self.learning_rate
        return self.lora_learning_rate or 3 * self.learning_rate

    def alpha(self, rank: int) -> float:
        """Returns LoRA's alpha at a rank."""
        return rank if self.lora_alpha is None else self.lora_alpha

    def identity(self, method: str, rank: int | None) -> dict[str, Any]:
        """Returns the settings, by flag, that decide the numbers of one training."""
        fields = {
            flag(name): str(value) if isinstance(value, pathlib.Path) else value
            for name, value in dataclasses.asdict(self).items()
            if name not in _NOT_PART_OF_A_RUN
        }
        return fields | {"method": method, "rank": rank}


def _check_counts(config: Config) -> None:
    names = (
        "updates batch_size micro_batches source_length target_length resample_every "
        "eval_every eval_examples decode_examples beams checkpoint_every"
    )
    for name in names.split():
        value = getattr(config, name)
        if value < 1:
            raise ConfigError(f"`{flag(name)}` must be at least 1, got {value}")
    for name in ("source_length", "target_length"):
        value = getattr(config, name)
        if value < 2:
            raise ConfigError(
                f"`{flag(name)}` must be at least 2 (a token and the end), got {value}"
            )
    for rank in config.ranks:
        if rank < 1:
            raise ConfigError(f"`--ranks` must be at least 1, got {rank}")
    for name in ("seed", "samples"):
        value = getattr(config, name)
        if value < 0:
            raise ConfigError(f"`{flag(name)}` must not be negative, got {value}")
    if config.stop_after is not None and not 1 <= config.stop_after <= config.updates:
        raise ConfigError(
            f"`--stop-after` must be between 1 and `--updates` ({config.updates}), "
            f"got {config.stop_after}"
        )


def _check_numbers(config: Config) -> None:
    for name in ("learning_rate", "lora_learning_rate", "lora_alpha"):
        value = getattr(config, name)
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise ConfigError(
                f"`{flag(name)}` must be positive and finite, got {value}"
            )
    for name in ("momentum", "dropout", "warmup_fraction"):
        value = getattr(config, name)
        if not 0 <= value < 1:
            raise ConfigError(f"`{flag(name)}` must be in [0, 1), got {value}")


def _check_methods(config: Config) -> None:
    for name in ("methods", "ranks"):
        values = getattr(config, name)
        if not values or len(set(values)) != len(values):
            raise ConfigError(
                f"`--{name}` must name at least one, each once, got "
                f"{' '.join(map(str, values))!r}"
            )
    accumulating = [name for name in config.methods if "accumulation" in name]
    if accumulating and config.batch_size % config.micro_batches:
        raise ConfigError(
            f"`--micro-batches` must divide `--batch-size` ({config.batch_size}) for "
            f"{accumulating[0]}, got {config.micro_batches}"
        )
    with_momentum = [name for name in config.methods if "momentum" in name]
    if config.optimizer == "adam" and with_momentum:
        raise ConfigError(
            f"`--methods` got {with_momentum[0]}, but `--optimizer adam` has a "
            "momentum of its own; use adafactor or sgd, or the other methods"
        )
