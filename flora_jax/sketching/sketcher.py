"""The leaves of a tree to their sketches and back.

What is sketched (:class:`ScaledLeaf`), how (:class:`Sketcher`: plans, a projection, and
keys), and what stands for the gradients of a tree (:class:`SketchedGradients`).
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import PyTree
from flora_jax._xla import is_sharded, materialized, unshared, unstacked, widened
from flora_jax.leaves.layers import by_layers, loop_steps
from flora_jax.leaves.mesh import replicated, replicated_along
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.spec import describe, make_spec
from flora_jax.projections.base import ObliviousProjection
from flora_jax.projections.linalg import product
from flora_jax.random.keys import leaf_keys
from flora_jax.sketching.sketch import Sketch

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Plans: TypeAlias = Sequence[LeafPlan]
# From arguments, an update and a parameter to the new parameter, or the same part of
# them: arrays of the leaf's number of axes, and scalars.
Apply: TypeAlias = Callable[[Any, jax.Array, jax.Array], jax.Array]
# Rules that a spec names only where they are others: a new one changes no old state.
# How a state is sharded does not change what it means.
_DEFAULTS = {
    x.name: x.default
    for x in dataclasses.fields(Sketch)
    if x.kw_only and x.name not in ("keep_logical_axes", "layer_shards")
}


class ScaledLeaf(NamedTuple):
    """A leaf times factors that are not multiplied out.

    What Adafactor does to a gradient is a product with a column, a row and a scalar. A
    sketch can apply them to the projection and to its result, so that the scaled
    gradient is never written to memory.

    Attributes:
      leaf: an array of any float dtype.
      factors: float32 arrays that broadcast to it: scalars, or with all of its axes.
      threshold: largest RMS of the product, which is divided by max(1, RMS/threshold)
        once its RMS is known; None if it is not clipped.
      source: what the leaf was expanded from, to do so again layer by layer, so that it
        need not be in memory as a whole; or None.
    """

    leaf: Float[Array, "..."]
    factors: tuple[jax.Array, ...] = ()
    threshold: Any = None
    source: Expansion | None = None

    def times(self, *factors: jax.Array) -> ScaledLeaf:
        """The leaf with more factors, after it is clipped."""
        given = self if self.threshold is None else self.clipped()
        full = [factor.astype(jnp.float32) for factor in factors]
        return given._replace(factors=(*given.factors, *full))

    def clipped(self, squares: jax.Array | None = None) -> ScaledLeaf:
        """The leaf with the factor that clips it; it must have a threshold.

        Args:
          squares: sums of squares of the product, all of it together; None to find them
            in a pass over the leaf.
        """
        full = self._replace(threshold=None)
        if squares is None:
            # On CPU XLA would write the product, which others read too, to memory.
            total = _sum_of_squares(unshared(full))
        else:
            # On CPU it would write the factors, broadcast to the leaf's size.
            total = jax.lax.platform_dependent(
                squares,
                full,
                cpu=lambda _, full: _sum_of_squares(jax.lax.optimization_barrier(full)),
                default=lambda squares, _: squares.sum(),
            )
        rms = jnp.sqrt(total / float(self.leaf.size))  # It may exceed int32.
        factor = 1 / jnp.maximum(1.0, rms / self.threshold)
        return full._replace(factors=(*self.factors, factor))

    def value(self) -> Float[Array, "..."]:
        """The product, float32, clipped."""
        full = self if self.threshold is None else self.clipped()
        leaf = full.leaf
        leaf = leaf if leaf.dtype == jnp.float32 else widened(leaf)
        # From the leaf on: the factors alone may overflow where it is zero.
        return functools.reduce(operator.mul, full.factors, leaf)

    def applied(self, apply: Apply, arguments: Any, param: jax.Array) -> jax.Array:
        """The new parameter, if this is its update."""
        if self.source is None:
            return apply(arguments, self.value(), param)
        full = self if self.threshold is None else self.clipped()
        new, _ = full.by_layers(
            lambda x, old, own: (apply(own, x, old), None), param, arguments
        )
        return new

    def by_layers(
        self,
        fn: Callable[..., tuple[Any, Any]],
        param: jax.Array | None = None,
        arguments: Any = None,
    ) -> tuple[Any, Any]:
        """``fn`` of layers of the product, not clipped, a parameter, and arguments.

        Args:
          fn: it returns the new parameter, and other arrays of as many axes.
          param: the parameter.
          arguments: arrays of as many axes, and scalars.

        Returns:
          What ``fn`` would return for all of it.
        """
        source, dtype = self.source, self.leaf.dtype
        assert source is not None

        def layers(plan: LeafPlan, sampled: Any, arrays: Any, param: Any) -> Any:
            sketch, factors, own = arrays
            leaf = source.sketcher.unsketch_leaf(plan, sampled, sketch).astype(dtype)
            return fn(ScaledLeaf(leaf, factors).value(), param, own)

        arrays = source.sketch, self.factors, arguments
        return source.sketcher.by_layers(
            layers, source.plan, source.sampled, arrays, param, on_one_device=True
        )


def _sum_of_squares(full: ScaledLeaf) -> jax.Array:
    """Of a leaf times its factors, in a pass over it."""
    if full.source is None:
        product = full.value()
        return jnp.sum(product * product)
    # With an axis for each of the leaf's, along which layers are put together.
    _, sums = full.by_layers(lambda x, *_: (None, jnp.sum(x * x, keepdims=True)))
    return jnp.sum(sums)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SketchedGradients:
    """What :func:`flora_jax.sketched_value_and_grad` returns in place of gradients.

    A pytree of arrays: it can be averaged over devices, scaled, and checked for NaN.

    Attributes:
      tree: of the gradients' structure: sketches, float32 in the state's shape, and
        gradients of dense leaves.
      plans: static plans of the leaves, in flattening order.
      like: static shapes and dtypes of the gradients.
      sketch: static; how they are sketched.
      name: static; the transformation that they are sketched for.
    """

    tree: PyTree
    plans: tuple[LeafPlan, ...] = dataclasses.field(metadata={"static": True})
    like: tuple[Any, ...] = dataclasses.field(metadata={"static": True})
    sketch: Sketch = dataclasses.field(metadata={"static": True})
    name: str = dataclasses.field(metadata={"static": True})

    def shapes(self) -> PyTree:
        """The tree of shapes and dtypes that the gradients would have."""
        return jax.tree.unflatten(jax.tree.structure(self.tree), self.like)

    def global_norm(self) -> jax.Array:
        """Estimates the norm of all gradients together, for logs and clipping.

        The square of it, Σ‖C‖² (times m/r for isometric sketches) over the sketched
        leaves and ‖G‖² over the dense ones, is an unbiased estimate of the square of
        the norm; its root is a little less on average. A clip by it is a clip by an
        estimate: ``optax.clip_by_global_norm`` takes it, for unbiased projections.

        Returns:
          A float32 scalar.
        """
        # E‖C‖² = ‖G‖² where E[SᵀS] = I; isometric rows are shorter by √(r/m).
        isometric = getattr(self.sketch.projection, "normalization", "") == "isometric"
        total = jnp.float32(0)
        for plan, leaf in zip(self.plans, jax.tree.leaves(self.tree), strict=True):
            spread = plan.width / plan.rank if isometric and not plan.dense else 1.0
            total += spread * jnp.sum(jnp.square(leaf.astype(jnp.float32)))
        return jnp.sqrt(total)

    def check(self, name: str, sketch: Sketch, plans: Plans) -> None:
        """Raises unless the transformation that is given them sketches as they do.

        Args:
          name: the transformation.
          sketch: its sketch.
          plans: its plans.

        Raises:
          ValueError: naming the first difference.
        """
        if name != self.name:
            raise ValueError(
                f"`updates` of {name} are sketches for {self.name}, whose projections"
                f" differ; give sketched_value_and_grad the state of {name}"
            )
        # What else a sketch says acts through the plans.
        for what in ("projection", "key_data"):
            ours, theirs = getattr(self.sketch, what), getattr(sketch, what)
            if np.any(ours != theirs):
                raise ValueError(
                    f"`updates` of {name} were sketched with {what} {ours}, but it has"
                    f" {theirs}; give both the same Sketch"
                )
        for ours, theirs in zip(self.plans, plans, strict=True):  # Of the same leaves.
            if ours != theirs:
                raise ValueError(
                    f"`updates` of {name} have leaf {ours.path!r} planned as"
                    f" {_differing(ours, theirs)}, but its own plan is"
                    f" {_differing(theirs, ours)}; give both the same Sketch"
                )


def _differing(plan: LeafPlan, other: LeafPlan) -> str:
    """The fields of a plan that differ from another's."""
    theirs = dataclasses.asdict(other)
    ours = dataclasses.asdict(plan).items()
    return ", ".join(f"{name}={x!r}" for name, x in ours if x != theirs[name])


def gradient_shapes(updates: PyTree) -> PyTree:
    """Gradients, or the shapes of those that sketches stand for."""
    return updates.shapes() if isinstance(updates, SketchedGradients) else updates


def refuse_sketches(
    name: str, gradients: PyTree, why: str, argument: str = "updates"
) -> None:
    """Raises if a transformation is given sketches that needs gradients.

    Args:
      name: the transformation.
      gradients: gradients, or :class:`SketchedGradients`.
      why: what it needs them for.
      argument: its name for the gradients.

    Raises:
      TypeError: for sketches.
    """
    if isinstance(gradients, SketchedGradients):
        raise TypeError(
            f"`{argument}` of {name} are SketchedGradients, but {why}; use jax.grad, or"
            " give the sketches to compressed_accumulation or compressed_momentum"
        )


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


OnSketch: TypeAlias = Callable[[SketchEvent], Any] | None


class EstimatedLeaf(NamedTuple):
    """The estimate from a sketch, and a leaf that is added to it.

    Neither is written to memory: the sum is computed where it is read, on a mesh layer
    by layer.

    Attributes:
      sketcher: how the leaf is sketched.
      plan: the leaf's plan.
      sampled: what determines S.
      sketch: C, in the state's shape; of a dense leaf, the leaf.
      leaf: what is added to C S, not to be clipped any more; None for nothing.
    """

    sketcher: Sketcher
    plan: LeafPlan
    sampled: Any
    sketch: Float[Array, "..."]
    leaf: ScaledLeaf | None

    def value(self) -> Float[Array, "..."]:
        """The sum, float32."""
        estimate = self.sketcher.unsketch_leaf(self.plan, self.sampled, self.sketch)
        return estimate if self.leaf is None else estimate + self.leaf.value()

    def applied(self, apply: Apply, arguments: Any, param: jax.Array) -> jax.Array:
        """The new parameter, if this is its update."""

        def renew(
            plan: LeafPlan, sampled: Any, arrays: Any, param: jax.Array
        ) -> tuple[jax.Array, None]:
            sketch, leaf, own = arrays
            part = EstimatedLeaf(self.sketcher, plan, sampled, sketch, leaf)
            return apply(own, part.value(), param), None

        arrays = self.sketch, self.leaf, arguments
        return self.sketcher.by_layers(renew, self.plan, self.sampled, arrays, param)[0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Expansion:
    """The sketch that a leaf of stacked layers was expanded from.

    Attributes:
      sketch: C, in the state's shape.
      sampled: what determines S.
      sketcher: static; how the leaf is sketched.
      plan: static; the leaf's plan.
    """

    sketch: Float[Array, "..."]
    sampled: Any
    sketcher: Sketcher = dataclasses.field(metadata={"static": True})
    plan: LeafPlan = dataclasses.field(metadata={"static": True})


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
          TypeError: for a leaf that is not an array of a real floating dtype.
          ValueError: if sketches were made in another way than this one's.
        """
        if not isinstance(gradients, SketchedGradients):
            return self.sketch.plan(gradients)
        plans = self.sketch.plan(gradients.shapes())
        gradients.check(self.name, self.sketch, plans)
        return plans

    def sample(self, plans: Plans, root: jax.Array, epoch: Any) -> list[Any]:
        """The projections of all leaves in one epoch; None for dense leaves.

        Leaves of equal rank and width are sampled together, so that sampling for
        hundreds of leaves takes a handful of operations.

        Args:
          plans: of the leaves.
          root: the state's key data.
          epoch: the epoch, or an array of one for each leaf.

        Returns:
          One tree per leaf, which determines its S.
        """
        sampled: list[Any] = [None] * len(plans)
        for rank, width, groups, keys in self._groups(plans, root, epoch):
            sample = functools.partial(self.projection.sample, rank=rank, width=width)
            # Written to memory once: every element of G reads a sign or a bucket.
            together = materialized(jax.vmap(sample)(keys))
            for own, members in zip(unstacked(together), groups, strict=True):
                for i in members:
                    sampled[i] = own
                    # Each by itself: leaves of equal size may differ in mesh axes.
                    if is_sharded():
                        sampled[i] = jax.tree.map(replicated, sampled[i])
        return sampled

    def transfers(
        self, plans: Plans, sampled: Sequence[Any], root: jax.Array, epoch: Any
    ) -> list[Any]:
        """The matrices S S′ᵀ from the given projections to those of another epoch.

        Each leaf in turn: no matrix of a leaf's size is made, and leaves of equal rank
        and width share one compiled loop.

        Args:
          plans: of the leaves.
          sampled: what determines each S.
          root: the state's key data.
          epoch: the epoch of S′, or an array of one for each leaf.

        Returns:
          One r x r matrix per leaf, float32; None for dense leaves.
        """
        matrices: list[Any] = [None] * len(plans)
        for rank, width, groups, keys in self._groups(plans, root, epoch):

            def matrix(pair: Any, rank: int = rank, width: int = width) -> jax.Array:
                old, key = pair
                new = self.projection.sample(key, rank, width)
                return self.projection.transfer(old, new, rank, width)

            # jax.lax.map and not vmap: one S′ in memory at a time.
            each = [sampled[members[0]] for members in groups]
            old = jax.tree.map(lambda *arrays: jnp.stack(arrays), *each)
            together = jax.lax.map(matrix, (old, keys))
            for own, members in zip(unstacked(together), groups, strict=True):
                for i in members:
                    matrices[i] = own
        return matrices

    def _groups(
        self, plans: Plans, root: jax.Array, epoch: Any
    ) -> list[tuple[int, int, list[list[int]], jax.Array]]:
        """Each rank and width, with the leaves that share a projection, and its key."""
        sizes: dict[tuple[int, int], dict[str, list[int]]] = {}
        for i, plan in enumerate(plans):
            if not plan.dense:
                by_path = sizes.setdefault((plan.rank, plan.width), {})
                by_path.setdefault(plan.key_path, []).append(i)
        found = []
        for (rank, width), by_path in sizes.items():
            groups = list(by_path.values())
            first = np.asarray([members[0] for members in groups])
            own = epoch[first] if jnp.ndim(epoch) else epoch
            keys = leaf_keys(root, self.name, list(by_path), own)
            found.append((rank, width, groups, keys))
        return found

    def sketch_leaf(
        self, plan: LeafPlan, sampled: Any, leaf: ScaledLeaf
    ) -> Float[Array, "..."]:
        """Sketches a leaf: float32, in the state's shape; dense leaves pass."""
        return self.sketch_with_squares(plan, sampled, leaf)[0]

    def sketch_with_squares(
        self, plan: LeafPlan, sampled: Any, leaf: ScaledLeaf
    ) -> tuple[Float[Array, "..."], Any]:
        """Sketches a leaf, and sums up the squares of its fold's sketched side.

        A factor that is constant along the sketched side multiplies the sketch, one
        that varies along it alone the columns of S: neither touches the full leaf.

        Args:
          plan: the leaf's plan.
          sampled: what determines S.
          leaf: the leaf with its factors; not clipped here.

        Returns:
          The sketch, float32, in the state's shape, and the sums, of the leaf's shape
          but for sketched axes of size 1. A dense leaf and None.
        """
        leaf = leaf._replace(threshold=None)
        if plan.dense:
            return leaf.value(), None
        if plan.batch_axes and loop_steps(plan):
            return self._sketch_by_layers(plan, sampled, leaf)
        # Row factors D and column factors W need no scaled copy of G:
        # (D G W) Sᵀ = D (G (S W)ᵀ) with columns sketched, alike for rows.
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
        sketch, squares = self.projection.compress_with_squares(
            sampled, matrix, plan.rank, plan.axis, weights=weights
        )
        if after:
            sketch = functools.reduce(operator.mul, after, sketch)
            # Roots first: the square of a factor may overflow where they are zero.
            squares = functools.reduce(operator.mul, after, jnp.sqrt(squares)) ** 2
        sketch = replicated_along(sketch, plan.axis)
        squares = plan.unfold(squares, plan.resized(1, None, plan.ones))
        return plan.unfold(sketch, plan.state_shape), squares

    def _sketch_by_layers(
        self, plan: LeafPlan, sampled: Any, leaf: ScaledLeaf
    ) -> tuple[Float[Array, "..."], Any]:
        """:meth:`sketch_with_squares` in a loop over the layers."""
        last = (len(plan.shape) - 2, len(plan.shape) - 1)
        swapped = plan.axis == -1 and not set(last) & set(plan.batch_axes)

        def swap(x: jax.Array) -> jax.Array:
            # A TPU pads the last axis of what a loop writes to 128: the rank is
            # sharded, and can be short.
            return x.swapaxes(*last) if swapped else x

        def layers(*own: Any) -> tuple[None, Any]:
            return None, jax.tree.map(swap, self.sketch_with_squares(*own[:3]))

        _, found = self.by_layers(layers, plan, sampled, leaf)
        return jax.tree.map(swap, found)

    def by_layers(
        self,
        fn: Callable[..., PyTree],
        plan: LeafPlan,
        sampled: Any,
        arrays: PyTree,
        renewed: PyTree = None,
        on_one_device: bool = False,
    ) -> tuple[PyTree, PyTree]:
        """``fn(plan, sampled, arrays, renewed)``, layer by layer on a mesh.

        Args:
          fn: of plan, S and arrays of some layers; see ``layers.by_layers``.
          plan: the leaf's plan.
          sampled: what determines S.
          arrays: of the leaf's number of axes, or scalars.
          renewed: arrays that ``fn`` returns anew.
          on_one_device: whether to do so without a mesh as well.

        Returns:
          New ``renewed``, and what else ``fn`` returns.
        """
        # A random S is the same for all layers; an adaptive one has the batch axes.
        shared = isinstance(self.projection, ObliviousProjection)
        return by_layers(
            lambda own, x, s, old: fn(own, sampled if shared else s, x, old),
            plan,
            arrays,
            None if shared else sampled,
            renewed,
            on_one_device,
        )

    def sketch_clipped(
        self, plan: LeafPlan, sampled: Any, leaf: ScaledLeaf
    ) -> tuple[Float[Array, "..."], ScaledLeaf]:
        """The sketch of a clipped leaf, and that leaf with its clipping factor.

        That factor multiplies the sketch: the RMS is found in the pass that sketches.
        """
        sketch, squares = self.sketch_with_squares(plan, sampled, leaf)
        if leaf.threshold is None:
            return sketch, leaf
        # Or XLA on GPUs would sketch once for the RMS and once for what it scales.
        sketch, squares = jax.lax.optimization_barrier((sketch, squares))
        clipped = leaf.clipped(squares)
        return sketch * clipped.factors[-1], clipped

    def unsketch_leaf(
        self, plan: LeafPlan, sampled: Any, sketch: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Estimates a leaf from its sketch: float32, in the leaf's shape.

        Args:
          plan: the leaf's plan.
          sampled: what determines S.
          sketch: C, in the state's shape; a dense leaf passes.
        """
        if plan.dense:
            return sketch.astype(jnp.float32)
        if plan.batch_axes and loop_steps(plan):
            return self.by_layers(
                lambda *own: (None, self.unsketch_leaf(*own[:3])), plan, sampled, sketch
            )[1]
        # G̃ = C S. To expand, each device needs the axis of size r in full.
        matrix = plan.fold(sketch.astype(jnp.float32))
        matrix = replicated_along(matrix, plan.axis)
        estimate = self.projection.expand(sampled, matrix, plan.width, plan.axis)
        return plan.unfold(estimate, plan.shape)

    def identity(self, plans: Plans) -> int:
        """A checksum of what the sketches of these leaves mean, but for the key."""
        fields = ("path", "batch_axes", "row_axes", "column_axes", "axis", "rank")
        # Sorted, as the order of the leaves does not change any sketch.
        meaning = sorted(
            operator.attrgetter(*fields)(plan)
            + ((plan.key_path,) if plan.key_path not in ("", plan.path) else ())
            for plan in plans
        )
        text = f"{self.name} {describe(self.projection)} {meaning}"
        return zlib.crc32(text.encode())

    def spec(self, plans: Plans, **settings: Any) -> jax.Array:
        """The ``spec`` of a state that holds such sketches.

        Args:
          plans: of the leaves.
          **settings: what else decides the meaning of the state.
        """
        rules = {
            name: rule
            for name, default in _DEFAULTS.items()
            if (rule := getattr(self.sketch, name)) != default
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


def moved_sketch(
    plan: LeafPlan, matrix: Float[Array, "*batch r r"], sketch: Float[Array, "..."]
) -> Float[Array, "..."]:
    """C S S′ᵀ for a sketch C in the state's shape; float32."""
    if plan.batch_axes and loop_steps(plan):
        # One matrix for all layers, or one for each.
        matrices = matrix if matrix.ndim > 2 else matrix[None]
        return by_layers(
            lambda own, x, s, _: (None, moved_sketch(own, s, x)), plan, sketch, matrices
        )[1]
    folded = plan.fold(sketch.astype(jnp.float32))
    if plan.batch_axes:  # Or the compiler would gather all layers before the loop.
        folded = replicated_along(folded, plan.axis)
    # On the sketched side: C (S S′ᵀ) for columns, (S S′ᵀ)ᵀ C for rows.
    return plan.unfold(product(folded, matrix, plan.axis), plan.state_shape)
