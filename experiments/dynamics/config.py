"""Which runs are taken apart. Nothing here imports jax."""

import dataclasses
import pathlib

from experiments.common.config import MethodName, check_at_least, check_some
from experiments.finetune.config import DatasetName


@dataclasses.dataclass(frozen=True)
class Run:
    """A run whose change of the weights is taken apart."""

    method: MethodName
    rank: int | None
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings."""

    checkpoint: pathlib.Path
    """Folder of the checkpoint to start from: intruder dimensions have no meaning for
    random weights. `python -m experiments.finetune docstrings --model gpt2-tiny
    --methods none` leaves one in runs/finetune/none/model."""
    output_dir: pathlib.Path = pathlib.Path("runs/dynamics")
    """Where dynamics.json, the table and the pictures go."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where data sets are kept."""
    dataset: DatasetName = "phrases"
    """What is trained on."""
    source_length: int = 48
    """Tokens of the input."""
    target_length: int = 32
    """Tokens of the output."""
    rank: int = 16
    """LoRA's rank in the first measurement."""
    sgd_learning_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Those of SGD in the first measurement; the theorem is about small ones."""
    adafactor_learning_rate: float = 0.16
    """Of Adafactor, which the theorem is not about, in the same."""
    runs: tuple[Run, ...] = (
        Run("none", None, 0.08),
        Run("lora_accumulation", 16, 0.16),
        Run("flora_accumulation", 16, 0.08),
        Run("lora_accumulation", 64, 0.16),
        Run("flora_accumulation", 64, 0.08),
    )
    """Runs of the second measurement, at the learning rates that were best in
    experiments/claims/results/gpt2.md."""
    traces_only: bool = False
    """Leave the second measurement out."""
    updates: int = 300
    """Of every run."""
    batch_size: int = 16
    """Pairs in one update."""
    micro_batches: int = 16
    """Parts of a batch in the accumulating methods."""
    seed: int = 0
    """Of data order, adapters and projections."""

    def validate(self) -> None:
        """Refuses settings that make no sense.

        Raises:
            ConfigError: naming the argument, its value, and what to give instead.
        """
        check_at_least(self, ("updates", "rank"))
        check_some(self)
