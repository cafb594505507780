"""The four trainings of the main job: an optimizer and its compressed twin, twice."""

import dataclasses

import optax

from experiments.common import optimizers
from experiments.main_job.config import Config


@dataclasses.dataclass(frozen=True)
class Method:
    """One training and where its optimizer keeps the buffer that FLORA compresses."""

    name: str
    title: str
    kind: str
    """What the buffer is: "momentum" or "accumulator"."""
    field: str
    """Name of the buffer in the optimizer's state."""
    compressed: bool

    def micro_batches(self, config: Config) -> int:
        """Returns the number of parts in which an update sees its batch."""
        return config.micro_batches if self.kind == "accumulator" else 1


METHODS = {
    method.name: method
    for method in (
        Method(
            name="adafactor_momentum",
            title="Adafactor + momentum",
            kind="momentum",
            field="ema",
            compressed=False,
        ),
        Method(
            name="flora_momentum",
            title="FLORA momentum",
            kind="momentum",
            field="momentum",
            compressed=True,
        ),
        Method(
            name="full_accumulation",
            title="Full accumulation",
            kind="accumulator",
            field="acc_grads",
            compressed=False,
        ),
        Method(
            name="flora_accumulation",
            title="FLORA accumulation",
            kind="accumulator",
            field="acc_grads",
            compressed=True,
        ),
    )
}


def schedule(config: Config, method: str) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to a tenth of it."""
    peak = config.peak_learning_rate(method)
    return optimizers.schedule(peak, config.updates, config.warmup_fraction, end=0.1)


def recipe(config: Config, name: str) -> optimizers.Recipe:
    """Returns what the optimizer of the training called `name` is made of."""
    method = METHODS[name]
    kept = "flora" if method.compressed else "full"
    return optimizers.recipe(
        config,
        config.rank,
        accumulation=kept if method.kind == "accumulator" else "none",
        momentum=kept if method.kind == "momentum" else "none",
    )


def optimizer(config: Config, name: str) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of the training called `name`."""
    return optimizers.make(recipe(config, name), schedule(config, name))
