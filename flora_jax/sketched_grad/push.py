"""How the sketch of an equation's output follows from sketches of its inputs.

S acts on a group of axes, the *sketched axes*, of a value; everything else about the
value is batch. An equation that is linear and leaves that group whole commutes with S,
and a product takes S on one of its operands:

  S·(xᵀ δ) = (x Sᵀ)ᵀ δ.

The sketch of a value is float32 and has the value's other axes in their order, then one
of size r. A rule says which sketches or values it reads and how the output's sketch is
made of them, or, in words, why there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal

Axes: TypeAlias = tuple[int, ...]


class Want(NamedTuple):
    """The sketch of a value, for one leaf.

    Attributes:
      leaf: number of the leaf whose projection S is.
      axes: the sketched axes in the order in which they fold; none has size 1.
    """

    leaf: int
    axes: Axes


Read: TypeAlias = tuple[Any, Want | None]  # An atom: its sketch, or None for itself.


class Push(NamedTuple):
    """A sketch in terms of what an equation reads.

    Attributes:
      reads: what is read.
      apply: from (sketches, *values) to the sketch.
    """

    reads: list[Read]
    apply: Callable[..., jax.Array]


Rule: TypeAlias = "Callable[[Any, int, Want, Look], Push | str]"


class Look:
    """What a rule may know of the program around an equation."""

    def __init__(self, jaxpr: Jaxpr, rules: Mapping[str, Rule]) -> None:
        """Notes which equation makes each variable."""
        self.jaxpr = jaxpr
        self._rules = rules
        self._producers = {v: eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        self._ends: dict[Any, bool] = {}

    def producer(self, atom: Any) -> Any:
        """The equation that makes it, or None for inputs and literals."""
        return None if isinstance(atom, Literal) else self._producers.get(atom)

    def push(self, eqn: Any, index: int, want: Want) -> Push | str:
        """The sketch of output ``index`` of an equation, or why it stops here."""
        rule = self._rules.get(eqn.primitive.name)
        return (
            "there is no rule for it" if rule is None else rule(eqn, index, want, self)
        )

    def ends_well(self, atom: Any, want: Want) -> bool:
        """Whether each path of a sketch ends in a product (or in zeros)."""
        eqn = self.producer(atom)
        if eqn is None:
            return False
        if (atom, want) not in self._ends:
            self._ends[atom, want] = self._passes(eqn, eqn.outvars.index(atom), want)
        return self._ends[atom, want]

    def _passes(self, eqn: Any, index: int, want: Want) -> bool:
        body = inlined(eqn)
        if body is not None:
            return Look(body[0], self._rules).ends_well(body[0].outvars[index], want)
        push = self.push(eqn, index, want)
        if isinstance(push, str):
            return False
        return all(self.ends_well(a, w) for a, w in push.reads if w is not None)

    def is_zero(self, atom: Any) -> bool:
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
_CALLS = ("call_jaxpr", "fun_jaxpr", "jaxpr")
_BODY = {
    "checkpoint": ("jaxpr",),
    "closed_call": _CALLS,
    "core_call": _CALLS,
    "custom_jvp_call": _CALLS,
    "custom_vjp_call": _CALLS,
    "custom_vjp_call_jaxpr": _CALLS,
    "jit": ("jaxpr",),
    "pjit": ("jaxpr",),
    "remat": ("jaxpr",),
    "remat2": ("jaxpr",),
}


def inlined(eqn: Any) -> tuple[Jaxpr, Sequence[Any]] | None:
    """Jaxpr and constants of a call that runs its body once, or None."""
    for name in _BODY.get(eqn.primitive.name, ()):
        if name in eqn.params:
            return opened(eqn.params[name])
    return None


def opened(body: Any) -> tuple[Jaxpr, Sequence[Any]]:
    """Jaxpr and constants of a body; only a checkpoint's, before 0.12, has none."""
    return getattr(body, "jaxpr", body), getattr(body, "consts", ())


def rest(ndim: int, axes: Axes) -> Axes:
    """The axes that are not sketched."""
    return tuple(i for i in range(ndim) if i not in axes)


def rest_shape(atom: Any, axes: Axes) -> tuple[int, ...]:
    """Sizes of a value's axes that are not sketched."""
    shape = atom.aval.shape
    return tuple(shape[i] for i in rest(len(shape), axes))


def zeros(eqn: Any, want: Want) -> Push:
    """The sketch of zeros."""
    shape = rest_shape(eqn.outvars[0], want.axes)
    return Push([], lambda s: jnp.zeros((*shape, s.rank(want.leaf)), jnp.float32))
