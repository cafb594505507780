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

from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import ObliviousProjection, multiply
from flora_jax.projections.dense import DenseProjection
from flora_jax.sketched_grad.rules import Operand, SketchRequest, Slot


class Fallback(NamedTuple):
    """A value that is computed in full and then sketched.

    Attributes:
      leaf: number of the parameter leaf whose gradient it is part of.
      primitive: what computes the value.
      shape: the value's shape.
      reason: why the sketch cannot be taken earlier.
    """

    leaf: int
    primitive: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class LeafProjections:
    """Applies the sampled projection of each leaf to parts of its gradient.

    Attributes:
      plans: of the leaves.
      projection: how they are sketched.
      sampled: one sampled projection per leaf, None for dense ones.
      matrices: S itself for leaves in a loop or branch, where it is formed once.
    """

    plans: Sequence[LeafPlan]
    projection: ObliviousProjection
    sampled: Sequence[Any]
    matrices: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def resized(self, shape: Sequence[int], request: SketchRequest) -> tuple[int, ...]:
        """The shape of a value's sketch: r on the first sketched axis, 1 on others."""
        new = list(shape)
        for a in request.axes:
            new[a] = 1
        new[request.axes[0]] = self.plans[request.leaf].rank
        return tuple(new)

    def with_matrices(self, leaves: set[int]) -> LeafProjections:
        """The same with S formed, for projections that would form it at each use."""
        if not isinstance(self.projection, DenseProjection):
            return self
        new = {
            i: self.projection.as_matrix(
                self.sampled[i], self.plans[i].rank, self.plans[i].width
            )
            for i in sorted(leaves - set(self.matrices))
        }
        return dataclasses.replace(self, matrices=self.matrices | new)

    def sketch(self, value: jax.Array, request: SketchRequest) -> jax.Array:
        """The sketch of a value, float32."""
        leaf, axes = request
        fixed = self.matrices.get(leaf, self.sampled[leaf])
        apply: Any = functools.partial(self._apply, request)
        sharding = jax.typeof(value).sharding
        if is_explicit(sharding):
            names = (*sharding.spec, *[None] * (value.ndim - len(sharding.spec)))
            kept = (None if i in axes else name for i, name in enumerate(names))
            out = jax.NamedSharding(sharding.mesh, jax.P(*kept))
            apply = jax.sharding.auto_axes(apply, out_sharding=out)
        return apply(value, fixed)

    def _apply(self, request: SketchRequest, value: jax.Array, fixed: Any) -> jax.Array:
        leaf, axes = request
        first, last, width = axes[0], axes[-1], self.plans[leaf].width
        if axes == tuple(range(first, last + 1)) and last < value.ndim - 1:
            # Whole rows are sketched where they lie: a transpose would copy the value.
            after = math.prod(value.shape[last + 1 :])
            matrix = value.reshape(*value.shape[:first], width, after)
            small = self._compress(leaf, matrix, -2, fixed)
            return small.reshape(self.resized(value.shape, request))
        last_axes = range(-len(axes), 0)
        turned = jnp.moveaxis(value, axes, last_axes)
        sides = turned.shape[: -len(axes)]
        small = self._compress(leaf, turned.reshape(*(sides or (1,)), width), -1, fixed)
        ones = (1,) * (len(axes) - 1)
        return jnp.moveaxis(
            small.reshape(*sides, self.plans[leaf].rank, *ones), last_axes, axes
        )

    def _compress(
        self, leaf: int, matrix: jax.Array, axis: int, fixed: Any
    ) -> jax.Array:
        if leaf in self.matrices:
            return multiply(fixed, matrix, axis, None)
        rank = self.plans[leaf].rank
        return self.projection.compress(fixed, matrix, rank, axis)


def is_explicit(sharding: Any) -> bool:
    """Whether a sharding is part of the type, and not the compiler's to choose."""
    explicit = jax.sharding.AxisType.Explicit
    return sharding is not None and explicit in sharding.mesh.axis_types


class Step(NamedTuple):
    """A part of a program: an equation, or what computes a sketch.

    Attributes:
      operands: what it reads.
      results: what it computes.
      run: from (LeafProjections, *operands) to the results.
      fallbacks: what it computes in full only to sketch it.
    """

    operands: list[Operand]
    results: list[Operand]
    run: Callable[..., Sequence[Any]]
    fallbacks: Sequence[Fallback] = ()


class Program(NamedTuple):
    """What :class:`flora_jax.sketched_grad.planner.Planner` makes of a jaxpr.

    Attributes:
      inputs: which of the jaxpr's inputs it takes, as values or sketches.
      steps: in the order in which they run.
      outputs: what it returns.
      fallbacks: what it computes in full only to sketch it.
      jaxpr: the jaxpr.
      consts: values of its constants.
    """

    inputs: list[Slot]
    steps: list[Step]
    outputs: list[Operand]
    fallbacks: list[Fallback]
    jaxpr: Jaxpr
    consts: Sequence[Any]

    def run(self, projections: LeafProjections, values: Sequence[Any]) -> list[Any]:
        """Computes the outputs from what ``inputs`` names."""
        known: dict[Operand, Any] = {}
        for (i, request), value in zip(self.inputs, values, strict=True):
            known[self.jaxpr.invars[i], request] = value
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
