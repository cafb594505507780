"""The leaves of a tree to their sketches and back: plans, a projection, and keys."""

from __future__ import annotations

import dataclasses
import functools
import operator
import zlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import PyTree
from flora_jax._xla import materialized
from flora_jax.leaves.mesh import is_sharded, replicated, replicated_along
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.spec import describe, make_spec
from flora_jax.projections.base import product
from flora_jax.random.keys import leaf_keys
from flora_jax.sketching.scaled_leaf import ScaledLeaf
from flora_jax.sketching.sketch import Sketch
from flora_jax.sketching.sketched_gradients import SketchedGradients, gradient_shapes

if TYPE_CHECKING:
    from jaxtyping import Array, Float


class SketchEvent(NamedTuple):
    """One leaf of one transformation at one update, as told to ``on_sketch``.

    Attributes:
      sketcher: the transformation's name and sketch.
      plan: the leaf's plan.
      sampled: what determines S.
      given: the ScaledLeaf that is sketched, G.
      sketch: C, in the state's shape.
      memory: what it goes into, in the state's shape: a momentum, an accumulator, or
        the sketch itself.
      largest: how many times ‖G‖ the norm of a stable memory may be, or None.
    """

    sketcher: Sketcher
    plan: LeafPlan
    sampled: Any
    given: ScaledLeaf
    sketch: Any
    memory: Any
    largest: Any = None


@dataclasses.dataclass(frozen=True)
class Sketcher:
    """How one transformation sketches the leaves of a tree.

    Attributes:
      name: the transformation's name, the salt of its keys.
      sketch: its sketch, with a projection that :func:`resolve` has filled in.
    """

    name: str
    sketch: Sketch

    @functools.cached_property
    def projection(self) -> Any:
        """How a matrix is sketched."""
        return self.sketch.projection

    def plan(self, gradients: PyTree) -> tuple[LeafPlan, ...]:
        """Plans of parameters or gradients, sketched or not.

        Args:
          gradients: a tree of arrays, or ``SketchedGradients``.

        Returns:
          One plan per leaf.

        Raises:
          TypeError: for a leaf that is no array of a real floating dtype.
          ValueError: if sketches were made in another way than this one's.
        """
        plans = self.sketch.plan(gradient_shapes(gradients))
        if isinstance(gradients, SketchedGradients):
            gradients.check(self.name, self.sketch, plans)
        return plans

    def sample(
        self, plans: Sequence[LeafPlan], root: jax.Array, epoch: Any
    ) -> list[Any]:
        """The projections of all leaves in one epoch; None for dense leaves.

        Leaves of equal rank and width are sampled together: the random numbers of a
        tree of hundreds of leaves are a handful of operations.

        Args:
          plans: of the leaves.
          root: the state's key data.
          epoch: the epoch, or an array of one for each leaf.

        Returns:
          One tree per leaf, which determines its S.
        """
        sampled: list[Any] = [None] * len(plans)
        for (rank, width), members in _groups(plans).items():
            keys = self.keys(plans, members, root, epoch)
            sample = functools.partial(self.projection.sample, rank=rank, width=width)
            arrays, tree = jax.tree.flatten(materialized(jax.vmap(sample)(keys)))
            if is_sharded():
                arrays = [replicated(x) for x in arrays]
            for place, i in enumerate(members):
                sampled[i] = jax.tree.unflatten(tree, [x[place] for x in arrays])
        return sampled

    def transfers(
        self,
        plans: Sequence[LeafPlan],
        sampled: Sequence[Any],
        root: jax.Array,
        epoch: Any,
    ) -> list[jax.Array]:
        """The matrices S S′ᵀ from the projections at hand to those of another epoch.

        Each leaf in turn: no matrix of a leaf's size is made, and leaves of equal rank
        and width share one compiled loop.

        Args:
          plans: of sketched leaves.
          sampled: what determines each S.
          root: the state's key data.
          epoch: the epoch of S′, or an array of one for each leaf.

        Returns:
          One r x r matrix per leaf, float32.
        """
        matrices: list[Any] = [None] * len(plans)
        for (rank, width), members in _groups(plans).items():

            def matrix(pair: Any, rank: int = rank, width: int = width) -> jax.Array:
                old, key = pair
                new = self.projection.sample(key, rank, width)
                return self.projection.transfer(old, new, rank, width)

            own = [jax.tree.leaves(sampled[i]) for i in members]
            old = jax.tree.unflatten(
                jax.tree.structure(sampled[members[0]]),
                [jnp.stack(arrays) for arrays in zip(*own, strict=True)],
            )
            keys = self.keys(plans, members, root, epoch)
            together = jax.lax.map(matrix, (old, keys))
            for place, i in enumerate(members):
                matrices[i] = together[place]
        return matrices

    def keys(
        self,
        plans: Sequence[LeafPlan],
        members: Sequence[int],
        root: jax.Array,
        epoch: Any,
    ) -> jax.Array:
        """Key data of some of the leaves, uint32 of shape (members, 2)."""
        if jnp.ndim(epoch):
            epoch = jnp.asarray(epoch)[np.asarray(members)]
        return leaf_keys(root, self.name, [plans[i].path for i in members], epoch)

    def sketch_leaf(
        self, plan: LeafPlan, sampled: Any, leaf: ScaledLeaf
    ) -> Float[Array, "..."]:
        """Sketches a leaf: float32, in the state's shape; dense leaves pass.

        A factor that is constant along the sketched side multiplies the sketch, one
        that varies along it alone the columns of S: neither touches the whole leaf.

        Args:
          plan: the leaf's plan.
          sampled: what determines S.
          leaf: the leaf with its factors.
        """
        if plan.dense:
            return leaf.value()
        matrix, after, weights = plan.fold(leaf.leaf), [], None
        other = -3 - plan.axis
        for factor in leaf.factors:
            folded = plan.fold(factor) if factor.ndim else factor[None, None]
            along, across = folded.shape[plan.axis], folded.shape[other]
            if along == 1 and across in (1, matrix.shape[other]):
                after.append(folded)
            elif across == 1 and along in (1, matrix.shape[plan.axis]):
                squeezed = folded.squeeze(other)
                weights = squeezed if weights is None else weights * squeezed
            else:
                # A factor of another fold, or one of the leaf's own size.
                full = jnp.broadcast_to(factor, plan.shape)
                matrix = matrix.astype(jnp.float32) * plan.fold(full)
        sketch = self.projection.compress(
            sampled, matrix, plan.rank, plan.axis, weights=weights
        )
        sketch = functools.reduce(operator.mul, after, sketch)
        return plan.unfold(replicated_along(sketch, plan.axis), plan.state_shape)

    def unsketch_leaf(
        self, plan: LeafPlan, sampled: Any, sketch: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Estimates a leaf from its sketch: float32, in the leaf's shape.

        Args:
          plan: the leaf's plan.
          sampled: what determines S.
          sketch: C, in the state's shape; a dense leaf passes.
        """
        sketch = sketch.astype(jnp.float32)
        if plan.dense:
            return sketch
        matrix = replicated_along(plan.fold(sketch), plan.axis)
        estimate = self.projection.expand(sampled, matrix, plan.width, plan.axis)
        return plan.unfold(estimate, plan.shape)

    def identity(self, plans: Sequence[LeafPlan]) -> int:
        """A checksum of what the sketches of these leaves mean, but for the key."""
        meaning = [
            (p.path, p.batch_axes, p.row_axes, p.column_axes, p.axis, p.rank)
            for p in plans
        ]
        text = f"{self.name} {describe(self.projection)} {sorted(meaning)}"
        return zlib.crc32(text.encode())

    def spec(self, plans: Sequence[LeafPlan], **settings: Any) -> jax.Array:
        """The ``spec`` of a state that holds such sketches.

        Args:
          plans: of the leaves.
          **settings: what else decides the meaning of the state.
        """
        rules = {
            name: getattr(self.sketch, name)
            for name, default in _DEFAULTS.items()
            if getattr(self.sketch, name) != default
        }
        return make_spec(
            self.name,
            self.sketch.key_data,
            self.identity(plans),
            projection=self.projection,
            rank=self.sketch.rank,
            **rules,
            **settings,
        )


# Rules that a spec names only where they are others: a new one changes no old state.
_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(Sketch)
    if field.name not in ("rank", "projection", "key")
}


def moved_sketch(
    plan: LeafPlan, matrix: Float[Array, "*batch r r"], sketch: Float[Array, "..."]
) -> Float[Array, "..."]:
    """C S S′ᵀ for a sketch C in the state's shape; float32."""
    new = product(plan.fold(sketch.astype(jnp.float32)), matrix, plan.axis)
    return plan.unfold(new, plan.state_shape)


def _groups(plans: Sequence[LeafPlan]) -> dict[tuple[int, int], list[int]]:
    """Places of the sketched leaves, by rank and width."""
    groups: dict[tuple[int, int], list[int]] = {}
    for i, plan in enumerate(plans):
        if not plan.dense:
            groups.setdefault((plan.rank, plan.width), []).append(i)
    return groups
