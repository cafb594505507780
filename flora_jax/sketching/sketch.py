"""The settings that define a sketch, in one object."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flora_jax import _validation
from flora_jax._typing import KeyLike, PyTree, RankSpec, Shape
from flora_jax.leaves import boxes
from flora_jax.leaves.plan import Fold, LeafPlan
from flora_jax.leaves.rules import ByPath, LeafRules, by_path, is_scalar
from flora_jax.projections.base import ObliviousProjection, Projection
from flora_jax.random.keys import raw_key

_SIDES = ("smaller", "larger", "left", "right")
_NAME = r"(?<![^/.]){}(?![^/.])"  # A part of a path, between slashes or dots.
_LEAST_SKETCHED = 0.1  # Of all elements, or init warns.


class SketchCycle(NamedTuple):
    """Identifies one of a sketch's projections; see :meth:`Sketch.cycle`.

    Attributes:
      key: root key data, uint32 of shape (2,).
      cycle: how often the projection was resampled before, int32.
    """

    key: Any
    cycle: Any


@dataclasses.dataclass(frozen=True)
class Sketch(LeafRules):
    """How the leaves of a tree are sketched: static settings, hashable.

    Pieces that have to agree, such as an accumulation and the gradients that are
    sketched for it, are given the same object. An int stands for ``Sketch(rank=int)``.

    Attributes:
      rank: sketch size r. An int >= 1; a fraction of the sketched side in (0, 1],
        max(1, round(fraction·side)), where 1.0 keeps leaves dense; a callable of (path,
        shape); a mapping from path patterns (``"*/mlp/*"``) to any of these; or a tree
        of ints such as :func:`flora_jax.ranks_for_budget` returns.
      projection: how a matrix is sketched; None for the recipe's own.
      key: int seed, typed threefry2x32 key, or its key data; concrete. Transformations
        salt it with their names; two of the same name in one chain need two keys.
      mask: None, a callable of (path, shape), or a tree of bools: which leaves may be
        sketched. :func:`flora_jax.not_embeddings` suits most models.
      side: ``"smaller"``, ``"larger"``, ``"left"`` (rows) or ``"right"`` (columns); or
        a mapping from path patterns to them. A square matrix is sketched on its columns
        by ``"smaller"``, on its rows by ``"larger"``. The smaller side leaves
        r·max(n, m) elements. The rows of a kernel (inputs, outputs) are its input side:
        :func:`flora_jax.sketched_value_and_grad` then keeps sketches of activations.
      same_projection: groups of names such as ``[("gate_proj", "up_proj")]``. Leaves
        whose paths are equal but for names of one group have the same random S, if rank
        and width are equal. Activations that are multiplied with several kernels are
        then sketched once.
      min_dim_size: smallest side of a matrix that is sketched; 128 as in Adafactor.
      max_aspect_ratio: largest ratio of its sides; 16 as in the paper's accumulation.
      weight_dimension_numbers: which axes form the matrix, in optax's convention; see
        :class:`flora_jax.LeafRules`, also for how trees are looked up.
      keep_logical_axes: whether the axis that holds the rank keeps a logical name that
        no active rule maps to the mesh; see :class:`flora_jax.LeafRules`.
      layer_shards: numbers of shards of stacked axes; see :class:`flora_jax.LeafRules`.

    Raises:
      TypeError: for arguments of a wrong type, and a traced key.
      ValueError: for arguments out of range.

    Example:
      >>> import flora_jax as fj
      >>> sketch = fj.Sketch(256, mask=fj.not_embeddings)
      >>> by_layer = fj.Sketch({"*/attn/*": 1 / 4, "*": 64})
    """

    rank: RankSpec
    projection: Projection | None = None
    key: KeyLike = 0
    side: Any = dataclasses.field(default="smaller", kw_only=True)
    same_projection: Any = dataclasses.field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        """Raises on bad arguments, and makes all of them hashable."""
        super().__post_init__()
        rank = self.rank
        if callable(rank):
            _validation.check_leaf_rule("rank", rank)
        elif rank is None or (is_scalar(rank) and not isinstance(rank, ByPath)):
            rank = _check_rank(rank)
        if self.projection is not None and not isinstance(self.projection, Projection):
            raise TypeError(
                "`projection` must be a flora_jax projection, got"
                f" {self.projection!r}; pass an instance such as"
                " flora_jax.CountSketch()"
            )
        object.__setattr__(self, "side", by_path(self.side, _check_side))
        if not isinstance(self.side, ByPath):
            _check_side(self.side)
        object.__setattr__(self, "same_projection", _groups(self.same_projection))
        object.__setattr__(self, "rank", by_path(rank))
        object.__setattr__(self, "key", _concrete(self.key))

    @functools.cached_property
    def rules(self) -> LeafRules:
        """The rules by which leaves are folded."""
        names = [field.name for field in dataclasses.fields(LeafRules)]
        return LeafRules(**{name: getattr(self, name) for name in names})

    @functools.cached_property
    def key_data(self) -> np.ndarray:
        """The root key, uint32 of shape (2,)."""
        return np.asarray(raw_key(self.key))

    def cycle(self, step: jax.typing.ArrayLike) -> SketchCycle:
        """Names the projections of one cycle, for sketches that no state outlives.

        Args:
          step: index of the cycle, an integer, possibly traced.

        Returns:
          What :func:`flora_jax.sketched_value_and_grad` takes as a state, where its
          gradients go to ``compressed_accumulator(sketch, step=step)``.

        Raises:
          TypeError: if ``step`` is not an integer.
        """
        if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
            raise TypeError(
                f"`step` must be an integer, got step={step}; pass the index of the"
                " cycle"
            )
        return SketchCycle(jnp.asarray(self.key_data), jnp.asarray(step, jnp.int32))

    def _plan(self, path: str, shape: Shape, fold: Fold) -> LeafPlan:
        plan = super()._plan(path, shape, fold)
        if plan.dense:
            return plan
        n, m = plan.rows, plan.columns
        side = self.side
        if isinstance(side, ByPath):
            side = side.find("side", path, shape)
        # A square matrix is sketched on its columns, on its rows by "larger".
        on_columns = {"smaller": m <= n, "larger": m > n, "right": True, "left": False}
        axis, width = (-1, m) if on_columns[side] else (-2, n)
        rank = self.rank
        if isinstance(rank, ByPath):
            rank = rank.find("rank", path, shape)
        rank = _check_rank(rank(path, shape) if callable(rank) else rank, path)
        if isinstance(rank, float):
            # Of the sketched side: leaves of all sizes are compressed equally.
            rank = max(1, round(rank * width))
        # Such a sketch would be as large as the leaf.
        if rank >= width:
            reason = f"{rank=} is not below the sketched side of its {n}x{m} fold"
            return LeafPlan.of(path, shape, reason)
        key_path = path
        for first, *others in self.same_projection:
            for name in others:
                pattern = _NAME.format(re.escape(name))
                key_path = re.sub(pattern, lambda _, first=first: first, key_path)
        return dataclasses.replace(plan, axis=axis, rank=rank, key_path=key_path)


def as_sketch(sketch: Sketch | int) -> Sketch:
    """The sketch, or that of a rank alone.

    Raises:
      TypeError: if it is neither.
    """
    if isinstance(sketch, Sketch):
        return sketch
    if isinstance(sketch, jax.Array):
        raise TypeError(
            f"`sketch` must be static, got the array {sketch}, which"
            " optax.inject_hyperparams may have made of an int; pass fj.Sketch(8)"
        )
    return Sketch(sketch)


@functools.lru_cache(maxsize=256)
def _resolved(sketch: Sketch, default: Projection, accepts: type[Projection]) -> Sketch:
    projection = default if sketch.projection is None else sketch.projection
    if not isinstance(projection, accepts):
        raise TypeError(
            "`projection` must be one that a key regenerates, got"
            f" {projection}, which is chosen from the gradient; use CountSketch()"
        )
    return dataclasses.replace(sketch, projection=projection.normalized_as(default))


def resolve(
    sketch: Sketch | int,
    default: Projection,
    accepts: type[Projection] = ObliviousProjection,
) -> Sketch:
    """Fills in what a transformation decides where the user does not.

    Args:
      sketch: the user's, or a rank.
      default: the transformation's projection, whose normalization also holds for a
        projection of the user's that leaves it open.
      accepts: the kind of projections that the transformation can use.

    Returns:
      A sketch whose projection has a normalization.

    Raises:
      TypeError: for a projection of another kind.
    """
    return _resolved(as_sketch(sketch), default, accepts)


def plan_leaves(params: PyTree, sketch: Sketch | int) -> PyTree:
    """Tells how each leaf of a tree would be folded and sketched; allocates nothing.

    Args:
      params: parameters, or ShapeDtypeStructs of them.
      sketch: the sketch, or its rank.

    Returns:
      A tree of :class:`LeafPlan` with the structure of ``params``.

    Raises:
      TypeError: for a leaf that is not an array of a real floating dtype.
      ValueError: for a rank, mask or dimension numbers that do not fit a leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.zeros((256, 512)), "b": jnp.zeros(512)}
      >>> plans = fj.plan_leaves(params, fj.Sketch(32))
      >>> plans["w"].state_shape, plans["b"].dense_reason
      ((32, 512), 'it has fewer than two axes')
    """
    plans = as_sketch(sketch).plan(params)
    return jax.tree.unflatten(jax.tree.structure(params), plans)


def check_leaves(
    name: str, rules: LeafRules, plans: tuple[LeafPlan, ...], params: PyTree
) -> None:
    """Checks, at init, how the leaves fold, are sharded, and are sketched.

    Args:
      name: the transformation.
      rules: its own.
      plans: of all leaves.
      params: the parameters, in their boxes.

    Raises:
      ValueError: if a stacked axis would be folded into a matrix.
    """
    rules.check_stacked(name, plans, params)
    _warn_if_replicated(name, plans, params)
    warn_if_dense(name, plans)


def _warn_if_replicated(name: str, plans: tuple[LeafPlan, ...], params: PyTree) -> None:
    """Warns where the rank does not let a sketch be sharded as its leaf is."""
    said: set[tuple[Shape, str]] = set()
    for plan, (_, node) in zip(plans, boxes.named_nodes(params), strict=True):
        lost = indivisible_rank(plan, node)
        # Equal layers have equal leaves.
        if lost and (plan.shape, lost) not in said:
            said.add((plan.shape, lost))
            _validation.warn(
                f"{name}: leaf {plan.path!r} of shape {plan.shape}: {lost}"
            )


def indivisible_rank(plan: LeafPlan, node: Any, sharding: Any = None) -> str:
    """How a sketch is sharded less than its leaf; an empty string if it is not.

    Args:
      plan: the leaf's.
      node: the leaf, or the box around it.
      sharding: the leaf's; None to take it from ``node``.
    """
    if plan.dense:
        return ""
    shards, kept = boxes.side_shards(node, plan, sharding)
    if kept >= shards:
        return ""
    # The next multiple, or the one before where that is no longer a sketch.
    better = -(-plan.rank // shards) * shards
    better = better if better < plan.width else plan.rank // shards * shards
    remedy = f"; rank {better} is" if better else ""
    share = "all" if kept == 1 else f"1/{kept}"
    return (
        f"rank {plan.rank} is not divisible by the {shards} shards of its sketched"
        f" side, so each device holds {share} of its sketch{remedy}"
    )


def warn_if_dense(name: str, plans: tuple[LeafPlan, ...]) -> None:
    """Warns where a state will be about as large as the uncompressed one.

    Args:
      name: the transformation.
      plans: of all leaves.
    """
    sizes = {plan.path: int(np.prod(plan.shape)) for plan in plans}
    # Leaves of another part of a recipe are replaced by single zeros.
    plans = tuple(plan for plan in plans if sizes[plan.path] > 1)
    total = sum(sizes[plan.path] for plan in plans)
    sketched = sum(sizes[plan.path] for plan in plans if not plan.dense)
    if not plans or sketched >= _LEAST_SKETCHED * total:
        return
    largest = max((p for p in plans if p.dense), key=lambda plan: sizes[plan.path])
    count = sum(not plan.dense for plan in plans)
    _validation.warn(
        f"{name} sketches only {count} of {len(plans)} leaves"
        f" ({sketched / total:.0%} of {total:,} elements), so it saves almost no"
        f" memory; its largest dense leaf {largest.path!r} of shape {largest.shape} is"
        f" dense because {largest.dense_reason}; inspect the leaves with"
        " flora_jax.plan_leaves, or use the plain optax optimizer"
    )


def _check_side(side: Any) -> str:
    _validation.check_choice("side", side, _SIDES)
    return side


def _groups(groups: Any) -> tuple[tuple[str, ...], ...]:
    """Groups of names as tuples, of which no name is in two."""
    remedy = 'pass groups such as [("gate_proj", "up_proj")]'
    given = f"got same_projection={groups!r}; {remedy}"
    lists = tuple, list
    if not isinstance(groups, lists) or not all(isinstance(x, lists) for x in groups):
        raise TypeError(f"`same_projection` must hold groups of names, {given}")
    found = tuple(tuple(group) for group in groups)
    if not all(found):
        raise ValueError(f"`same_projection` must hold no empty group, {given}")
    names = [name for group in found for name in group]
    for name in names:
        if not isinstance(name, str) or not re.fullmatch("[^/.]+", name):
            raise TypeError(
                f"`same_projection` must hold parts of paths, without slashes, {given}"
            )
    if len({*names}) < len(names):
        raise ValueError(f"`same_projection` must hold each name once, {given}")
    return found


def _check_rank(rank: Any, path: str | None = None) -> int | float:
    where = "" if path is None else f" for leaf {path!r}"
    remedy = f"pass the sketch size{where}, for example 64, or 1 / 4 of the width"
    if isinstance(rank, float | np.floating):
        if not 0 < rank <= 1:
            raise ValueError(
                f"`rank` as a fraction must lie in (0, 1], got rank={rank}; {remedy}"
            )
        return float(rank)
    return _validation.check_positive_int("rank", rank, remedy)


def _concrete(key: Any) -> Any:
    """A seed as an int, any other key as its two words."""
    if isinstance(key, jax.core.Tracer):
        raise TypeError(
            f"`key` must be concrete, got the traced key {key}; the state carries the"
            " key through jit: give the sketch an int seed"
        )
    words = raw_key(key)
    if isinstance(key, int | np.integer):
        return int(key)
    return tuple(int(word) for word in np.asarray(words))
