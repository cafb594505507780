"""What a rule is: how the sketch of an equation's output follows from its operands.

S acts on a group of axes of a value, the *sketched axes*; the others are batch. An
equation that is linear and keeps that group together commutes with S, and a product
takes S on one of its operands:

  S·(xᵀ δ) = (x Sᵀ)ᵀ δ.

The sketch of a value is float32 and is sharded as the value is: the first of the
sketched axes has size r, the others have size 1. An equation that commutes with S is
therefore applied to sketches as it was to values. A rule names the sketches and values
to read and how the output's sketch is computed from them, or says in words why it
cannot be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var

from flora_jax._typing import Axes, Shape

Atom: TypeAlias = Var | Literal


class SketchRequest(NamedTuple):
    """Which sketch of a value is wanted.

    Attributes:
      leaf: index of the parameter leaf of whose gradient it is part.
      axes: the sketched axes in the order in which they fold; none has size 1.
      same_as: index of the first leaf that has the same S.
      of_factor: whether it is the sketch of a factor of a product, such as x Sᵀ of
        activations x, and not of a part of the gradient.
    """

    leaf: int
    axes: Axes
    same_as: int
    of_factor: bool = False

    def along(self, axes: Iterable[int]) -> SketchRequest:
        """The request for a value that has the sketched axes elsewhere."""
        return self._replace(axes=tuple(axes))

    def factor(self, axes: Iterable[int]) -> SketchRequest:
        """The request for a factor: that of any leaf whose S is the same."""
        return SketchRequest(self.same_as, tuple(axes), self.same_as, of_factor=True)


# A variable or literal, or an input or output by its index; and which sketch of it, or
# None for the value itself.
Operand: TypeAlias = tuple[Atom, SketchRequest | None]
Slot: TypeAlias = tuple[int, SketchRequest | None]


class Rewrite(NamedTuple):
    """What computes the sketch of an output in place of the output.

    Attributes:
      operands: what is read.
      compute: from (LeafProjections, *operands) to the sketch.
    """

    operands: Sequence[Operand]
    compute: Callable[..., jax.Array]

    def run(self, projections: Any, *values: Any) -> list[jax.Array]:
        """The sketch, as the results of a step."""
        return [self.compute(projections, *values)]


@dataclasses.dataclass(frozen=True)
class Target:
    """An output of an equation of which a sketch is wanted.

    Attributes:
      eqn: the equation.
      index: of the output.
      request: the sketch.
      flow: the equations around it.
    """

    eqn: JaxprEqn
    index: int
    request: SketchRequest
    flow: DataFlow

    @property
    def operands(self) -> Sequence[Atom]:
        """The equation's operands."""
        return self.eqn.invars

    @property
    def params(self) -> dict[str, Any]:
        """The equation's parameters."""
        return self.eqn.params

    @property
    def axes(self) -> Axes:
        """The sketched axes of the output."""
        return self.request.axes

    @property
    def shape(self) -> Shape:
        """The output's shape."""
        return shape_of(self.eqn.outvars[self.index])

    def along(self, axes: Iterable[int]) -> SketchRequest:
        """The sketch of an operand by the same S."""
        return self.request.along(axes)

    def commutes(self, *requests: SketchRequest | None) -> Rewrite:
        """The equation itself, applied to these sketches of its operands."""
        eqn, index = self.eqn, self.index

        def compute(_: Any, *values: Any) -> Any:
            results = eqn.primitive.bind(*values, **eqn.params)
            return results[index] if eqn.primitive.multiple_results else results

        return Rewrite(list(zip(eqn.invars, requests, strict=True)), compute)

    def entrywise(self, function: Callable[[Any], jax.Array]) -> Rewrite:
        """A function of the same sketch of the operand with the output's index."""
        source = self.operands[self.index], self.request
        return Rewrite([source], lambda _, x: function(x))

    def zeros(self) -> Rewrite:
        """The sketch of zeros."""
        shape, request = self.shape, self.request
        return Rewrite([], lambda s: jnp.zeros(s.resized(shape, request), jnp.float32))


Rule: TypeAlias = Callable[[Target], Rewrite | str]


class DataFlow:
    """Which equation makes each variable of a jaxpr, for rules that look further."""

    def __init__(self, jaxpr: Jaxpr, rules: Mapping[str, Rule]) -> None:
        """Indexes a jaxpr; ``rules`` are by the primitives' names."""
        self.jaxpr = jaxpr
        self._rules = rules
        self._producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self._reaches: dict[Operand, bool] = {}

    def producer(self, atom: Atom) -> JaxprEqn | None:
        """The equation that makes it, or None for inputs and literals."""
        return None if isinstance(atom, Literal) else self._producers.get(atom)

    def rewrite(
        self, eqn: JaxprEqn, index: int, request: SketchRequest
    ) -> Rewrite | str:
        """The sketch of an output of an equation, or why there is none."""
        rule = self._rules.get(eqn.primitive.name)
        if rule is None:
            return "there is no rule for it"
        return rule(Target(eqn, index, request, self))

    def reaches_product(self, atom: Atom, request: SketchRequest) -> bool:
        """Whether S goes back on each path to a product, or to zeros."""
        # Where a path ends in a value that has to be formed, S is better applied after
        # the equation that makes it smaller (a sum, a slice).
        known, eqn = self._reaches, self.producer(atom)
        if eqn is None or isinstance(atom, Literal):
            return False
        if (atom, request) not in known:
            known[atom, request] = self._commutes(eqn, eqn.outvars.index(atom), request)
        return known[atom, request]

    def _commutes(self, eqn: JaxprEqn, index: int, request: SketchRequest) -> bool:
        body = called_body(eqn)
        if body is not None:
            inner, _ = opened(body)
            out = inner.outvars[index]
            return DataFlow(inner, self._rules).reaches_product(out, request)
        found = self.rewrite(eqn, index, request)
        if isinstance(found, str):
            return False
        return all(
            self.reaches_product(atom, request)
            for atom, request in found.operands
            if request is not None and not request.of_factor
        )

    def is_zero(self, atom: Atom) -> bool:
        """Whether a value is known to be zero everywhere."""
        if isinstance(atom, Literal):
            return np.ndim(atom.val) == 0 and atom.val == 0
        eqn = self.producer(atom)
        return (
            eqn is not None
            and eqn.primitive.name in _KEEP_ZERO
            and self.is_zero(eqn.invars[0])
        )


_KEEP_ZERO = ("broadcast_in_dim", "convert_element_type", "copy", "pvary", "reshape")
# Calls that run their body once, and the parameters in which it may stand.
_CALLS = (
    *("checkpoint", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call"),
    *("custom_vjp_call_jaxpr", "jit", "pjit", "remat", "remat2"),
)
_BODIES = ("call_jaxpr", "fun_jaxpr", "jaxpr")


def called_body(eqn: JaxprEqn) -> Any:
    """The jaxpr, closed or not, of a call that runs it once; None for all others."""
    if eqn.primitive.name not in _CALLS:
        return None
    return next((eqn.params[name] for name in _BODIES if name in eqn.params), None)


def opened(body: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Jaxpr and constants of a body; a checkpoint's, before 0.12, is not closed."""
    return getattr(body, "jaxpr", body), getattr(body, "consts", ())


def shape_of(atom: Atom) -> Shape:
    """The shape of a variable or literal."""
    aval: Any = atom.aval
    return aval.shape


def dtype_of(atom: Atom) -> np.dtype:
    """The dtype of a variable or literal."""
    aval: Any = atom.aval
    return aval.dtype
