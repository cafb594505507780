"""The methods that are compared: rows of the paper's tables."""

import dataclasses

import optax

from experiments.common import optimizers
from experiments.finetune.config import Config


@dataclasses.dataclass(frozen=True)
class Method:
    """Where a method keeps gradients and momentum, and what it trains."""

    title: str
    accumulation: optimizers.Kept = "none"
    momentum: optimizers.Kept = "none"
    adapters: bool = False
    """Train LoRA's adapters in place of the matrices."""

    @property
    def ranked(self) -> bool:
        """Whether a rank has a meaning."""
        return self.adapters or "flora" in (self.accumulation, self.momentum)

    def micro_batches(self, config: Config) -> int:
        """Returns the number of parts in which an update sees its batch."""
        return 1 if self.accumulation == "none" else config.micro_batches


METHODS = {
    "none": Method("No accumulation"),
    "full_accumulation": Method("Naive accumulation", accumulation="full"),
    "flora_accumulation": Method("FLORA accumulation", accumulation="flora"),
    "lora_accumulation": Method(
        "LoRA accumulation", accumulation="full", adapters=True
    ),
    "full_momentum": Method("Momentum", momentum="full"),
    "flora_momentum": Method("FLORA momentum", momentum="flora"),
    "lora_momentum": Method("LoRA momentum", momentum="full", adapters=True),
}


def schedule(config: Config, name: str) -> optax.Schedule:
    """Returns the learning rate over the updates of the method called `name`."""
    end = {"cosine": 0.1, "constant": 1.0}[config.schedule]
    return optimizers.schedule(
        config.rate(name), config.updates, config.warmup_fraction, end=end
    )


def recipe(config: Config, name: str, rank: int | None) -> optimizers.Recipe:
    """Returns what the optimizer of the method called `name` is made of."""
    method = METHODS[name]
    return optimizers.recipe(
        config,
        rank or 1,  # of no meaning where the method has none
        method.accumulation,
        method.momentum,
        config.optimizer,
    )


def optimizer(
    config: Config, name: str, rank: int | None
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of the method called `name`."""
    return optimizers.make(recipe(config, name, rank), schedule(config, name))
