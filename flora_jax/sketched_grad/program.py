"""A program that computes some outputs of a jaxpr, and only sketches of others."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from flora_jax._typing import Shape
from flora_jax.leaves.mesh import is_explicit
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import DenseProjection, ObliviousProjection
from flora_jax.sketched_grad.rewrites import Operand, SketchRequest, Slot


class Fallback(NamedTuple):
    """A value that is computed in full and then sketched.

    Attributes:
      leaf: index of the parameter leaf whose gradient it is part of.
      primitive: what computes the value.
      shape: the value's shape.
      reason: why the sketch cannot be taken earlier.
    """

    leaf: int
    primitive: str
    shape: Shape
    reason: str


@dataclasses.dataclass(frozen=True)
class LeafProjections:
    """Applies the sampled projection of each leaf to parts of its gradient.

    Attributes:
      plans: of the leaves.
      projection: how they are sketched.
      sampled: one sampled projection per leaf, None for dense ones.
    """

    plans: Sequence[LeafPlan]
    projection: ObliviousProjection
    sampled: Sequence[Any]

    def resized(self, shape: Sequence[int], request: SketchRequest) -> Shape:
        """The shape of a value's sketch: r on the first sketched axis, 1 on others."""
        new = [1 if a in request.axes else n for a, n in enumerate(shape)]
        new[request.axes[0]] = self.plans[request.same_as].rank
        return tuple(new)

    def with_matrices(self, wanted: Sequence[Slot]) -> LeafProjections:
        """The same with S formed, for projections that would form it at each use.

        Args:
          wanted: of a loop or branch, which sketches nothing of other leaves.
        """
        if not isinstance(self.projection, DenseProjection):
            return self
        formed, requests = list(self.sampled), [request for _, request in wanted]
        for i in sorted({request.same_as for request in requests if request}):
            size = self.plans[i].rank, self.plans[i].width
            formed[i] = self.projection.as_matrix(self.sampled[i], *size)
        return LeafProjections(self.plans, _Formed(), formed)

    def sketch(self, value: jax.Array, request: SketchRequest) -> jax.Array:
        """The sketch of a value, float32; that of a factor in the factor's dtype."""
        apply: Any = functools.partial(self._apply, request)
        sharding = jax.typeof(value).sharding
        if is_explicit(sharding):
            # JAX refuses reshapes of sharded values there. Inside auto_axes the
            # compiler chooses; the result keeps the mesh axes of the other sides.
            names = (*sharding.spec, *[None] * (value.ndim - len(sharding.spec)))
            kept = (None if i in request.axes else x for i, x in enumerate(names))
            out = jax.NamedSharding(sharding.mesh, jax.P(*kept))
            apply = jax.sharding.auto_axes(apply, out_sharding=out)
        small = apply(value, self.sampled[request.same_as])
        # Not in float32 for bfloat16 factors: XLA on CPU fails to run some products.
        return small.astype(value.dtype) if request.of_factor else small

    def _apply(self, request: SketchRequest, value: jax.Array, s: Any) -> jax.Array:
        axes, plan = request.axes, self.plans[request.same_as]
        first, last, compress = axes[0], axes[-1], self.projection.compress
        if axes == tuple(range(first, last + 1)) and last < value.ndim - 1:
            # Rows are sketched in place: a transpose would copy the value.
            after = math.prod(value.shape[last + 1 :])
            matrix = value.reshape(*value.shape[:first], plan.width, after)
            small = compress(s, matrix, plan.rank, -2)
            return small.reshape(self.resized(value.shape, request))
        last_axes = range(-len(axes), 0)
        turned = jnp.moveaxis(value, axes, last_axes)
        sides = turned.shape[: -len(axes)]
        matrix = turned.reshape(*(sides or (1,)), plan.width)
        small = compress(s, matrix, plan.rank, -1)
        ones = (1,) * (len(axes) - 1)
        return jnp.moveaxis(small.reshape(*sides, plan.rank, *ones), last_axes, axes)


class _Formed(DenseProjection):
    """S is what stands for it."""

    def as_matrix(self, sampled: Any, rank: int, width: int) -> jax.Array:
        return sampled


class Step(NamedTuple):
    """A part of a program: an equation, or what computes a sketch.

    Attributes:
      operands: what it reads.
      results: what it computes.
      run: from (LeafProjections, *operands) to the results.
      fallbacks: what it computes in full only to sketch it.
      read_in_full: leaves whose factors it reads in full, too.
    """

    operands: Sequence[Operand]
    results: Sequence[Operand]
    run: Callable[..., Sequence[Any]]
    fallbacks: Sequence[Fallback] = ()
    read_in_full: Sequence[int] = ()


class Program(NamedTuple):
    """What :class:`flora_jax.sketched_grad.planner.Planner` makes of a jaxpr.

    Attributes:
      inputs: which of the jaxpr's inputs it takes, as values or sketches.
      steps: in the order in which they run.
      outputs: what it returns.
      fallbacks: what it computes in full only to sketch it.
      read_in_full: leaves whose factors a step reads in full, too.
      jaxpr: the jaxpr.
      consts: values of its constants.
    """

    inputs: list[Slot]
    steps: list[Step]
    outputs: list[Operand]
    fallbacks: list[Fallback]
    read_in_full: list[int]
    jaxpr: Jaxpr
    consts: Sequence[Any]

    def run(self, projections: LeafProjections, values: Sequence[Any]) -> list[Any]:
        """Computes the outputs from what ``inputs`` names."""
        given = [(self.jaxpr.invars[i], request) for i, request in self.inputs]
        known: dict[Operand, Any] = dict(zip(given, values, strict=True))
        constants = dict(zip(self.jaxpr.constvars, self.consts, strict=True))

        def read(operand: Operand) -> Any:
            atom, request = operand
            if not isinstance(atom, Literal) and atom not in constants:
                return known[operand]
            value = atom.val if isinstance(atom, Literal) else constants[atom]
            if request is None:
                return value
            return projections.sketch(jnp.asarray(value), request)

        for step in self.steps:
            results = step.run(projections, *map(read, step.operands))
            known.update(zip(step.results, results, strict=True))
        return [read(operand) for operand in self.outputs]
