"""A tree's leaves to their sketches and back."""

from flora_jax.sketching.scaled_leaf import ScaledLeaf
from flora_jax.sketching.sketch import (
    Sketch,
    SketchCycle,
    as_sketch,
    plan_leaves,
    resolve,
    warn_if_dense,
)
from flora_jax.sketching.sketched_gradients import (
    SketchedGradients,
    gradient_shapes,
    refuse_sketches,
)
from flora_jax.sketching.sketcher import Sketched, Sketcher, moved_sketch

__all__ = [
    "ScaledLeaf",
    "Sketch",
    "SketchCycle",
    "Sketched",
    "SketchedGradients",
    "Sketcher",
    "as_sketch",
    "gradient_shapes",
    "moved_sketch",
    "plan_leaves",
    "refuse_sketches",
    "resolve",
    "warn_if_dense",
]
