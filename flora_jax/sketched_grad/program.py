"""What a program of sketches is made of, and what runs it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, Literal

from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import MatrixProjection, multiply
from flora_jax.sketched_grad.push import Axes, Read, Want, rest

Asked: TypeAlias = tuple[int, Want | None]  # Of an output or input, by its number.


class Stop(NamedTuple):
    """A value that is computed in full, and then sketched.

    Attributes:
      leaf: number of the leaf.
      primitive: what computes the value.
      shape: the value's shape.
      reason: why the sketch does not go through.
    """

    leaf: int
    primitive: str
    shape: tuple[int, ...]
    reason: str


@dataclasses.dataclass(frozen=True)
class Operators:
    """Applies the projections of all leaves.

    Attributes:
      plans: of the leaves.
      projection: how.
      drawn: one tree per leaf, None for dense ones.
      matrices: S itself for leaves in a loop, where it is formed once.
    """

    plans: Sequence[LeafPlan]
    projection: Any
    drawn: Sequence[Any]
    matrices: dict[int, jax.Array] = dataclasses.field(default_factory=dict)

    def rank(self, leaf: int) -> int:
        """Size of a leaf's sketched side after sketching."""
        return self.plans[leaf].rank

    def formed(self, leaves: set[int]) -> Operators:
        """With S formed, for projections that would form it at each use."""
        if not isinstance(self.projection, MatrixProjection):
            return self
        new = {
            i: self.projection.entries(
                self.drawn[i], self.plans[i].rank, self.plans[i].width
            )
            for i in sorted(leaves - set(self.matrices))
        }
        return dataclasses.replace(self, matrices=self.matrices | new)

    def sketch(self, leaf: int, value: jax.Array, axes: Axes) -> jax.Array:
        """The sketch of a value along axes: its other axes, then r; float32."""
        fixed = self.matrices.get(leaf, self.drawn[leaf])
        apply = functools.partial(self._apply, leaf, axes)
        sharding = jax.typeof(value).sharding
        if is_explicit(sharding):
            names = (*sharding.spec, *[None] * (value.ndim - len(sharding.spec)))
            kept = (*(names[i] for i in rest(value.ndim, axes)), None)
            out = jax.NamedSharding(sharding.mesh, jax.P(*kept))
            run: Any = jax.sharding.auto_axes(apply, out_sharding=out)
            return run(value, fixed)
        return apply(value, fixed)

    def _apply(self, leaf: int, axes: Axes, value: jax.Array, fixed: Any) -> jax.Array:
        first, last, n = axes[0], axes[-1], value.ndim
        sides = tuple(value.shape[i] for i in rest(n, axes))
        if tuple(range(first, last + 1)) == axes and last < n - 1:
            # Whole rows are sketched where they lie.
            before = value.shape[:first]
            after = math.prod(value.shape[last + 1 :])
            matrix = value.reshape(*before, self.plans[leaf].width, after)
            small = jnp.moveaxis(self._compress(leaf, matrix, -2, fixed), -2, -1)
        else:
            turned = jnp.transpose(value, (*rest(n, axes), *axes))
            matrix = turned.reshape(*(sides or (1,)), self.plans[leaf].width)
            small = self._compress(leaf, matrix, -1, fixed)
        return small.reshape(*sides, self.rank(leaf))

    def _compress(
        self, leaf: int, matrix: jax.Array, axis: int, fixed: Any
    ) -> jax.Array:
        if leaf in self.matrices:
            return multiply(fixed, matrix, axis, None)
        return self.projection.compress(fixed, matrix, self.rank(leaf), axis)


def is_explicit(sharding: Any) -> bool:
    """Whether a sharding is part of a type, and not the compiler's to choose."""
    explicit = jax.sharding.AxisType.Explicit
    return sharding is not None and explicit in sharding.mesh.axis_types


class Step(NamedTuple):
    """One equation, or one sketch.

    Attributes:
      reads: what it takes.
      writes: what it gives.
      run: from (operators, values read) to the values written.
    """

    reads: list[Read]
    writes: list[Read]
    run: Callable[[Operators, list[Any]], Sequence[Any]]


class Program(NamedTuple):
    """The plan of a jaxpr.

    Attributes:
      inputs: what is taken of the jaxpr's inputs.
      steps: in the order in which they run.
      outputs: atoms and what of them is given.
      stops: where sketches end before a product.
      jaxpr: the jaxpr.
      consts: values of its constants.
    """

    inputs: list[Asked]
    steps: list[Step]
    outputs: list[Read]
    stops: list[Stop]
    jaxpr: Jaxpr
    consts: Sequence[Any]

    def run(self, operators: Operators, values: Sequence[Any]) -> list[Any]:
        """Computes the outputs from what ``inputs`` names."""
        env: dict[Read, Any] = {}
        for v, const in zip(self.jaxpr.constvars, self.consts, strict=True):
            env[v, None] = const
        for (i, want), value in zip(self.inputs, values, strict=True):
            env[self.jaxpr.invars[i], want] = value

        def read(item: Read) -> Any:
            atom, want = item
            if not isinstance(atom, Literal):
                return env[item]
            if want is None:
                return atom.val
            return operators.sketch(want.leaf, jnp.asarray(atom.val), want.axes)

        for step in self.steps:
            results = step.run(operators, [read(item) for item in step.reads])
            env.update(zip(step.writes, results, strict=True))
        return [read(item) for item in self.outputs]
