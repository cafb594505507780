"""One leaf to its sketch and back: a plan, a projection and what was drawn for it."""

from __future__ import annotations

import dataclasses
import functools
import numbers
import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax.random import keys as _keys
from flora_jax.leaves import mesh as _mesh
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.leaves.spec import make_spec
from flora_jax.projections import ObliviousProjection, Projection
from flora_jax.projections.base import product
from flora_jax.transforms.parts import ScaledLeaf
from flora_jax.sketching.sketched_gradients import SketchedGradients
from flora_jax.sketching.watch import Sketched, note

if TYPE_CHECKING:
    from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Sketcher:
    """The settings that decide what a sketch means.

    Attributes:
      name: the transformation's name, the salt of its keys.
      rules: which leaves are sketched, and on which side.
      projection: how.
    """

    name: str
    rules: LeafRules
    projection: Any

    accepts: ClassVar[type] = ObliviousProjection

    def __post_init__(self) -> None:
        """Raises TypeError if the projection is none, or not of the kind needed."""
        if not isinstance(self.projection, self.accepts):
            kind = "" if self.accepts is Projection else " that a key regenerates"
            raise TypeError(
                f"`projection` must be a flora_jax projection{kind}, got"
                f" {self.projection!r}; pass an instance such as"
                " flora_jax.CountSketch()"
            )

    def draw(self, plans: Sequence[LeafPlan], root: jax.Array, epoch: Any) -> list[Any]:
        """What the keys of all leaves decide in one epoch; None for dense leaves.

        Leaves of equal rank and width are drawn together: the random numbers of a tree
        of hundreds of leaves are a handful of operations.

        Args:
          plans: of the leaves.
          root: the state's key data.
          epoch: the epoch, or an array of one for each leaf.

        Returns:
          One tree per leaf.
        """
        drawn: list[Any] = [None] * len(plans)
        for (rank, width), members in _groups(plans).items():
            keys = self.keys(plans, members, root, epoch)
            draw = functools.partial(self.projection.draw, rank=rank, width=width)
            together = jax.tree.map(_mesh.whole, _written_out(jax.vmap(draw)(keys)))
            for place, i in enumerate(members):
                drawn[i] = jax.tree.map(operator.itemgetter(place), together)
        return drawn

    def transfers(
        self, plans: Sequence[LeafPlan], root: jax.Array, epoch: Any
    ) -> list[jax.Array]:
        """The matrices S S′ᵀ from the last epoch's projections to this one's.

        Each leaf in turn: no matrix of a leaf's size is made, and leaves of equal rank
        and width share one compiled loop.

        Args:
          plans: of sketched leaves.
          root: the state's key data.
          epoch: the new epoch, or an array of one for each leaf.

        Returns:
          One r x r matrix per leaf, float32.
        """
        matrices: list[Any] = [None] * len(plans)
        for (rank, width), members in _groups(plans).items():

            def matrix(keys: jax.Array, rank: int = rank, width: int = width) -> Any:
                old, new = (self.projection.draw(key, rank, width) for key in keys)
                return self.projection.transfer(old, new, rank, width)

            epochs = (epoch - 1, epoch)
            keys = [self.keys(plans, members, root, number) for number in epochs]
            together = jax.lax.map(matrix, jnp.stack(keys, axis=1))
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
        return _keys.leaf_keys(root, self.name, [plans[i].path for i in members], epoch)

    def sketch(
        self, plan: LeafPlan, drawn: Any, leaf: ScaledLeaf
    ) -> Float[Array, "..."]:
        """Sketches a leaf: float32, in the state's shape; dense leaves pass.

        So do leaves in the state's shape, which are sketches already.

        A factor that is constant along the sketched side multiplies the sketch, one
        that varies along it alone the columns of S: neither touches the whole leaf.
        """
        # A full rank, which tests plan, would leave the shapes equal.
        sketched = plan.rank < plan.width and leaf.leaf.shape == plan.state_shape
        if sketched or plan.dense_reason is not None:
            return leaf.value()
        matrix, after, weights = plan.fold(leaf.leaf), [], None
        other = -3 - plan.axis
        for factor in leaf.factors:
            folded = plan.fold(factor) if factor.ndim else factor[None, None]
            if folded.shape[plan.axis] == 1 and _spans(folded, matrix, other):
                after.append(folded)
            elif folded.shape[other] == 1 and _spans(folded, matrix, plan.axis):
                squeezed = folded.squeeze(other)
                weights = squeezed if weights is None else weights * squeezed
            else:
                # A factor of another fold, or one of the leaf's own size.
                full = jnp.broadcast_to(factor, plan.shape)
                matrix = matrix.astype(jnp.float32) * plan.fold(full)
        sketch = self.projection.compress(
            drawn, matrix, plan.rank, plan.axis, weights=weights
        )
        sketch = functools.reduce(operator.mul, after, sketch)
        return plan.unfold(_mesh.whole_along(sketch, plan.axis), plan.state_shape)

    def planned(self, gradients: Any) -> tuple[list[LeafPlan], Any]:
        """Plans of gradients, sketched or not, and their shapes and dtypes.

        Args:
          gradients: gradients, or ``SketchedGradients``.

        Returns:
          The plans, and the gradients themselves or ShapeDtypeStructs in their place.

        Raises:
          ValueError: if sketches were made in another way than this one's.
        """
        if not isinstance(gradients, SketchedGradients):
            return self.rules.plan(gradients), gradients
        shapes = gradients.shapes()
        plans = self.rules.plan(shapes)
        gradients.check(self.name, plans, self.projection)
        return plans, shapes

    def unsketch(
        self, plan: LeafPlan, drawn: Any, sketch: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Estimates a leaf from its sketch: float32, in the leaf's shape."""
        sketch = sketch.astype(jnp.float32)
        if plan.dense_reason is not None:
            return sketch
        matrix = _mesh.whole_along(plan.fold(sketch), plan.axis)
        estimate = self.projection.expand(drawn, matrix, plan.width, plan.axis)
        return plan.unfold(estimate, plan.shape)

    def spec(self, root: Any, **settings: Any) -> jax.Array:
        """The ``spec`` of a state that holds such sketches."""
        rules, axes = self.rules, self.rules.weight_dimension_numbers
        return make_spec(
            self.name,
            root,
            projection=self.projection,
            rank=rules.rank if isinstance(rules.rank, numbers.Integral) else "by leaf",
            side=rules.side,
            min_dim_size=rules.min_dim_size,
            max_aspect_ratio=f"{rules.max_aspect_ratio:g}",
            weight_dimension_numbers="callable" if callable(axes) else axes,
            **settings,
        )


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
        if plan.dense_reason is None:
            groups.setdefault((plan.rank, plan.width), []).append(i)
    return groups


def _written_out(tree: Any) -> Any:
    """The same arrays, in memory before anything reads them.

    XLA would fuse the hash behind a sign or an index into each loop that reads one, and
    compute it anew for every element of the gradient; on CPU it drops barriers before
    it fuses. The result of a loop it cannot fuse: this one negates twice.
    """
    return jax.lax.fori_loop(
        0, 2, lambda _, arrays: jax.tree.map(operator.neg, arrays), tree
    )


def _spans(factor: jax.Array, matrix: jax.Array, axis: int) -> bool:
    return factor.shape[axis] in (1, matrix.shape[axis])


def accumulate(
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    use_mean: bool,
    grads: Sequence[jax.Array],
    acc: Sequence[jax.Array],
    root: jax.Array,
    i: Any,
    cycle: Any,
) -> list[jax.Array]:
    """Adds micro-step i of a cycle to the accumulators of all leaves."""
    return [
        accumulate_leaf(sketcher, plan, drawn, use_mean, i, grad, leaf)
        for plan, drawn, grad, leaf in zip(
            plans, sketcher.draw(plans, root, cycle), grads, acc, strict=True
        )
    ]


def accumulate_leaf(
    sketcher: Sketcher,
    plan: LeafPlan,
    drawn: Any,
    use_mean: bool,
    i: Any,
    grad: Float[Array, "..."],
    acc: Float[Array, "..."],
) -> Float[Array, "..."]:
    """One leaf's running mean or sum of sketches, after micro-step i."""
    total = acc.astype(jnp.float32)
    given = ScaledLeaf(grad)
    fresh = sketcher.sketch(plan, drawn, given)
    total = total + ((fresh - total) / (i + 1) if use_mean else fresh)
    note(plan, lambda: Sketched(sketcher, plan, drawn, given, fresh, total))
    return total.astype(acc.dtype)


def estimate(
    sketcher: Sketcher,
    plans: Sequence[LeafPlan],
    axis_name: Any,
    acc: Sequence[jax.Array],
    root: jax.Array,
    cycle: Any,
) -> list[jax.Array]:
    """What the accumulators of all leaves stand for: float32, in the leaves' shapes.

    Of each device's own accumulators the mean over mesh axes, if there are any: the
    mean of sketches is the sketch of the mean.
    """
    if axis_name is not None:
        acc = jax.lax.pmean(list(acc), axis_name)
    return [
        sketcher.unsketch(plan, drawn, leaf)
        for plan, drawn, leaf in zip(
            plans, sketcher.draw(plans, root, cycle), acc, strict=True
        )
    ]
