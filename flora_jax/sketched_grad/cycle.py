"""Which projections a gradient is sketched with: name, key and cycle of a state."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import PyTree
from flora_jax.leaves.paths import normalize_path
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.spec import spec_identity
from flora_jax.leaves.trees import unboxed
from flora_jax.random.keys import check_state_key
from flora_jax.sketching.sketch import SketchCycle
from flora_jax.sketching.sketcher import Sketcher
from flora_jax.transforms.accumulation import NAME as ACCUMULATION
from flora_jax.transforms.accumulation import CompressedAccumulationState
from flora_jax.transforms.momentum import NAME as MOMENTUM
from flora_jax.transforms.momentum import CompressedMomentumState

# What holds key and cycle in a state, and the name by which its keys are salted.
_SOURCES = {
    CompressedAccumulationState: (ACCUMULATION, "gradient_step"),
    CompressedMomentumState: (MOMENTUM, "epoch"),
}


class ProjectionSource(NamedTuple):
    """What determines the projections of a gradient.

    Attributes:
      name: of the transformation that the sketches are for, the salt of its keys.
      key: root key data, uint32 of shape (2,).
      cycle: how often the projection was resampled, an int32 scalar.
      spec: what the state means, or None if there is no state.
    """

    name: str
    key: Any
    cycle: Any
    spec: Any = None

    def agrees(self, sketcher: Sketcher, plans: tuple[LeafPlan, ...]) -> Any:
        """Whether the state was made with the sketcher's sketch, possibly traced."""
        agrees = jnp.all(jnp.asarray(self.key) == sketcher.sketch.key_data)
        if self.spec is None:
            return agrees
        return agrees & (
            spec_identity(self.spec) == np.uint32(sketcher.identity(plans))
        )


def find_source(state: PyTree) -> ProjectionSource:
    """Finds the outermost accumulation or momentum in a state.

    Args:
      state: the state of an optimizer, or of the accumulation or momentum itself, or a
        SketchCycle.

    Raises:
      TypeError: if something cast the state's key.
      ValueError: if there is none, or more than one.
    """
    if isinstance(state, SketchCycle):
        return ProjectionSource(ACCUMULATION, *state)

    def holds_key(x: Any) -> bool:
        return type(x) in _SOURCES

    # An accumulation is a leaf here: what its inner state holds is given the gradient
    # that the accumulation estimates.
    leaves = jax.tree_util.tree_flatten_with_path(state, is_leaf=holds_key)[0]
    found = [(normalize_path(path), x) for path, x in leaves if holds_key(x)]
    if not found:
        raise ValueError(
            "`state` must hold the state of compressed_accumulation or"
            f" compressed_momentum, got {type(state).__name__} without one; pass the"
            " optimizer's state before the arguments of the function, or"
            " sketch.cycle(step) where the gradients go to compressed_accumulator"
        )
    if len(found) > 1:
        paths = ", ".join(f"{type(x).__name__} at {path!r}" for path, x in found)
        raise ValueError(
            f"`state` must hold one state that sketches gradients, got {paths}; pass"
            " the one that the gradients are for"
        )
    own = found[0][1]
    name, cycle = _SOURCES[type(own)]
    source = ProjectionSource(name, *unboxed((own.key, getattr(own, cycle), own.spec)))
    check_state_key(name, source.key)
    return source
