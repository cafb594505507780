"""The four trainings: an optimizer and its compressed twin, twice.

What FLORA replaces is one line in each pair; compare the branches of `optimizer`.
"""

import dataclasses

import optax

import flora_jax as fj
from experiments.config import Config


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


def matrices_only(path: str, shape: tuple[int, ...]) -> bool:
    """Says which parameters may be compressed: all but the embeddings.

    The gradient of an embedding is sparse by rows, unlike a matrix product's. Here
    the aspect rule alone would let the (4096, 256) token embedding in.
    """
    del shape
    return not path.startswith(("wte/", "wpe/"))


def schedule(config: Config, method: str) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to a tenth of it."""
    peak = config.peak_learning_rate(method)
    warmup = round(config.warmup_fraction * config.updates)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),  # at 0 the first update would be lost
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(config.updates, warmup + 1),
        end_value=peak / 10,
    )


def optimizer(config: Config, name: str) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of the training called `name`."""
    rate = schedule(config, name)
    match name:
        case "adafactor_momentum":
            return optax.adafactor(rate, momentum=config.momentum)
        case "flora_momentum":
            return fj.flora(
                rate,
                rank=config.rank,
                b1=config.momentum,
                resample_every=config.resample_every,
                reading=config.reading,
                projection=getattr(fj, config.projection)(),
                key=config.seed,
                mask=matrices_only,
            )
        case "full_accumulation":
            return optax.MultiSteps(
                optax.adafactor(rate), config.micro_batches
            ).gradient_transformation()
        case "flora_accumulation":
            return fj.compressed_accumulation(
                optax.adafactor(rate),
                config.micro_batches,
                config.rank,
                projection=getattr(fj, config.projection)(),
                key=config.seed,
                mask=matrices_only,
            )
    raise ValueError(f"`name` must be one of {', '.join(METHODS)}, got {name!r}")
