"""The optimizers of all trainings: what FLORA replaces is one line in each pair."""

import dataclasses
from typing import Any, Literal

import optax

import flora_jax as fj

Kept = Literal["none", "full", "flora"]
"""Whether a buffer is there at all, in full, or as a sketch."""

_EMBEDDINGS = frozenset({"wte", "wpe", "shared", "lm_head", "relative_attention_bias"})


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One optimizer without its learning rate."""

    accumulation: Kept
    momentum: Kept
    micro_batches: int
    """Calls in one cycle of the accumulation."""
    b1: float
    """Decay of the momentum."""
    rank: int
    resample_every: int | None
    """Updates between two projections of the momentum; None for a single one."""
    reading: str
    projection: str
    seed: int
    """Of the projections."""
    sketched_gradients: bool
    """FLORA's accumulation is given sketches; full gradients are never formed."""
    base: Literal["adafactor", "adam", "sgd"] = "adafactor"


def recipe(
    config: Any,
    rank: int,
    accumulation: Kept,
    momentum: Kept,
    base: Literal["adafactor", "adam", "sgd"] = "adafactor",
) -> Recipe:
    """Returns the recipe that the settings of a pretraining or a fine-tuning give."""
    return Recipe(
        base=base,
        accumulation=accumulation,
        momentum=momentum,
        micro_batches=config.micro_batches,
        b1=config.momentum,
        rank=rank,
        resample_every=config.resample_every,
        reading=config.reading,
        projection=config.projection,
        seed=config.seed,
        sketched_gradients=config.sketched_gradients,
    )


def matrices_only(path: str, shape: tuple[int, ...]) -> bool:
    """Says which parameters may be compressed: all but embeddings and the head.

    The gradient of an embedding is sparse by rows, unlike a matrix product's, and the
    aspect rule alone lets those of small vocabularies in.
    """
    del shape
    return _EMBEDDINGS.isdisjoint(path.split("/"))


def make(
    recipe: Recipe, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer of a recipe."""
    inner = _base(recipe, rate)
    match recipe.accumulation:
        case "none":
            return inner
        case "full":
            multi = optax.MultiSteps(inner, recipe.micro_batches)
            return multi.gradient_transformation()
        case "flora":
            return fj.compressed_accumulation(
                inner, recipe.micro_batches, key=recipe.seed, **rules(recipe)
            )


def _base(
    recipe: Recipe, rate: optax.ScalarOrSchedule
) -> optax.GradientTransformationExtraArgs:
    match recipe.base, recipe.momentum:
        case "adafactor", "none":
            return optax.adafactor(rate)
        case "adafactor", "full":
            return optax.adafactor(rate, momentum=recipe.b1)
        case "adafactor", "flora":
            return fj.flora(rate, b1=recipe.b1, **_sketch(recipe))
        case "adam", "none":  # Adam's own momentum, which is not what is compared.
            return optax.adam(rate, b1=recipe.b1)
        case "sgd", "none":
            return optax.sgd(rate)
        case "sgd", "full":
            average = optax.ema(recipe.b1, debias=False)
            return optax.chain(average, optax.scale_by_learning_rate(rate))
        case "sgd", "flora":
            average = fj.compressed_momentum(recipe.b1, **_sketch(recipe))
            return optax.chain(average, optax.scale_by_learning_rate(rate))
    raise ValueError(
        f"`recipe` has no optimizer {recipe.base!r} with momentum {recipe.momentum!r}"
    )


def _sketch(recipe: Recipe) -> dict[str, Any]:
    return rules(recipe) | {
        "resample_every": recipe.resample_every,
        "reading": recipe.reading,
        "key": recipe.seed,
    }


def rules(recipe: Recipe) -> dict[str, Any]:
    """Returns how leaves are sketched."""
    return {
        "rank": recipe.rank,
        "projection": getattr(fj, recipe.projection)(),
        "mask": matrices_only,
    }


def schedule(
    peak: float, updates: int, warmup_fraction: float, *, end: float
) -> optax.Schedule:
    """Linear warm-up to the peak, then a cosine down to `end` of it."""
    warmup = round(warmup_fraction * updates)
    return optax.warmup_cosine_decay_schedule(
        init_value=peak / (warmup + 1),  # at 0 the first update would be lost
        peak_value=peak,
        warmup_steps=warmup,
        decay_steps=max(updates, warmup + 1),
        end_value=peak * end,
    )
