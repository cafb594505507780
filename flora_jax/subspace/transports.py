"""How an inner optimizer's moments are carried over when the basis is replaced."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from flora_jax._typing import PyTree
from flora_jax.leaves.moments import FIRST, KINDS, SECOND, find_moments
from flora_jax.leaves.plan import LeafPlan
from flora_jax.sketching.sketcher import moved_sketch
from flora_jax.subspace.residuals import check_decays

if TYPE_CHECKING:
    from jaxtyping import Array, Float

Moments: TypeAlias = "dict[str, Float[Array, '...']]"


class BasisChange(NamedTuple):
    """One sketched leaf at the step that replaces its basis.

    Attributes:
      plan: the leaf's plan.
      matrix: T = S S′ᵀ, from the old basis to the new.
      fresh: the gradient's sketch in the new basis, for transports that need it.
      count: number t of updates that the moments have seen.
    """

    plan: LeafPlan
    matrix: Float[Array, "*batch r r"]
    fresh: Float[Array, "..."] | None
    count: Any

    def moved(self, x: jax.Array, matrix: jax.Array) -> jax.Array:
        """A moment in the state's shape times an r x r matrix."""
        return moved_sketch(self.plan, matrix, x)


class Transport:
    """Base class of transports: how moments are carried over when S is replaced.

    Transports are frozen objects, and pytrees of their hyperparameters, which may be
    traced. They are deliberately not callable: ``optax.inject_hyperparams`` treats
    callable arguments as schedules. To write one, subclass it as a frozen dataclass
    registered by ``jax.tree_util.register_dataclass``, override :meth:`move`, and set
    ``moves`` to True.

    Attributes:
      moves: whether moments change at all.
      needs_isometry: whether S has to have orthonormal rows.
      needs_random_basis: whether S has to be regenerated from a key, not stored.
      needs_sketch: whether :meth:`move` needs the gradient's sketch in the new basis.
    """

    moves: ClassVar[bool] = False
    needs_isometry: ClassVar[bool] = False
    needs_random_basis: ClassVar[bool] = False
    needs_sketch: ClassVar[bool] = False

    def check(self) -> None:
        """Raises on bad hyperparameters; pytrees are rebuilt from any leaves."""

    def move(self, change: BasisChange, moments: Moments) -> Moments:
        """One leaf's moments in the new basis.

        Args:
          change: what replaces what.
          moments: of one NamedTuple of the inner state, by field; float32, in the
            state's shape.

        Returns:
          The moments, by field.
        """
        del change
        return moments


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Keep(Transport):
    """Moments stay what they were (GaLore, APOLLO).

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.flora_adamw(1e-3, fj.Sketch(32), transport=fj.Keep())
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Squared(Transport):
    """First moments m become m T, second ones v T∘T.

    T = S S′ᵀ leads from the old basis to the new, and T∘T is its elementwise square:
    variances of independent entries add up.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.flora_adamw(1e-3, fj.Sketch(32), transport=fj.Squared())
    """

    moves: ClassVar[bool] = True
    needs_isometry: ClassVar[bool] = True

    def move(self, change: BasisChange, moments: Moments) -> Moments:
        """See :meth:`Transport.move`."""
        first, second = self.matrices(change)
        return {
            name: change.moved(x, second if KINDS[name] == SECOND else first)
            for name, x in moments.items()
        }

    def matrices(self, change: BasisChange) -> tuple[jax.Array, jax.Array]:
        """What first moments and second ones are multiplied by."""
        return change.matrix, change.matrix**2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreserveRMS(Squared):
    """First moments m become √(m/r)·m T, second ones v T∘T with normalized columns.

    The columns of T∘T are divided by their sums: an oblivious basis then changes the
    size of neither. Stored bases are not random: this would inflate their moments.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.flora_adamw(1e-3, fj.Sketch(32), transport=fj.PreserveRMS())
    """

    needs_random_basis: ClassVar[bool] = True

    def matrices(self, change: BasisChange) -> tuple[jax.Array, jax.Array]:
        """See :meth:`Squared.matrices`."""
        squared = change.matrix**2
        total = squared.sum(-2, keepdims=True)
        inflated = (change.plan.width / change.plan.rank) ** 0.5 * change.matrix
        # A new direction that is orthogonal to all old ones starts at zero.
        return inflated, squared / jnp.where(total > 0, total, 1.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LDAdam(Squared):
    """First moments become m T; of second ones the variance about the mean is moved.

    With m̂ and v̂ free of bias, v̂ becomes the absolute value of (v̂ − m̂²) T∘T + (m̂ T)².
    m is the first moment in the same NamedTuple of ``inner``'s state as v.

    Attributes:
      b1: decay β1 with which ``inner`` debiases its first moment, as Adam does. Recipes
        fill in their own.
      b2: the same of its second moment.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.flora_adamw(1e-3, fj.Sketch(32), transport=fj.LDAdam())

    References:
      Robert et al., `LDAdam <https://arxiv.org/abs/2410.16103>`_, 2024
    """

    b1: Any = None
    b2: Any = None

    def check(self) -> None:
        """Raises without decays, or with decays out of range."""
        if self.b1 is None and self.b2 is None:
            raise ValueError(
                "`transport` LDAdam needs the decays of `inner`, got b1=None, b2=None;"
                " pass them, such as LDAdam(b1=0.9, b2=0.999)"
            )
        check_decays(self)

    def move(self, change: BasisChange, moments: Moments) -> Moments:
        """See :meth:`Transport.move`."""
        matrix, (one, two) = change.matrix, _biases(self, change.count)
        firsts = [x for name, x in moments.items() if KINDS[name] == FIRST]
        new = {}
        for name, x in moments.items():
            if KINDS[name] != SECOND:
                new[name] = change.moved(x, matrix)
                continue
            mean = firsts[0] / one if firsts else jnp.zeros_like(x)
            spread = change.moved(x / two - mean**2, matrix**2)
            new[name] = two * jnp.abs(spread + change.moved(mean, matrix) ** 2)
        return new


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Reset(Transport):
    """Moments start anew: m̂ = R, v̂ = R², as if the step were Adam's first.

    Sums (``trace``, ``acc_grads``, ``error``) become zero.

    Attributes:
      b1: decay β1 with which ``inner`` debiases its first moment as Adam does; None if
        it does not. Recipes fill in their own.
      b2: the same of its second moment.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.flora_adamw(1e-3, fj.Sketch(32), transport=fj.Reset())
    """

    b1: Any = None
    b2: Any = None

    moves: ClassVar[bool] = True
    needs_sketch: ClassVar[bool] = True

    def check(self) -> None:
        """Raises on decays out of range."""
        check_decays(self)

    def move(self, change: BasisChange, moments: Moments) -> Moments:
        """See :meth:`Transport.move`."""
        assert change.fresh is not None
        one, two = _biases(self, change.count)
        start = {FIRST: one * change.fresh, SECOND: two * change.fresh**2}
        return {
            # Before the first update there is nothing to start anew.
            name: jnp.where(change.count > 0, start.get(KINDS[name], 0.0), x)
            for name, x in moments.items()
        }


def _biases(owner: LDAdam | Reset, count: Any) -> tuple[Any, Any]:
    """1 − β^t of both moments, which takes their bias away; 1 where nothing debiases.

    At t = 0 both moments are zero, whatever they are divided by.
    """
    if owner.b1 is None:
        return 1.0, 1.0
    steps = jnp.maximum(count, 1)
    return 1 - owner.b1**steps, 1 - owner.b2**steps


def check_moments(transport: Transport, state: Any, sketches: PyTree) -> None:
    """Raises unless a transport finds all moments of an inner state.

    Args:
      transport: one that moves moments.
      state: state of the inner transformation.
      sketches: the tree of sketches that it was made for.

    Raises:
      ValueError: if there are no moments, or others than those of the sketches.
    """
    name, fields = type(transport).__name__, ", ".join(KINDS)
    groups, wanted = find_moments(state, sketches), _shapes(sketches)
    for group in groups:
        for field, tree in group.items():
            # Eight bits are codes, whose scales stand elsewhere.
            coded = any(x.dtype.itemsize == 1 for x in jax.tree.leaves(tree))
            if _shapes(tree) != wanted or coded:
                raise ValueError(
                    f"`transport` {name} moves moments that are kept like the sketches,"
                    f" got an `inner` whose {field!r} is not: use Keep(), and quantize"
                    " outside, by quantize_state(scale_in_subspace(...))"
                )
    if not groups and wanted:
        raise ValueError(
            f"`transport` {name} needs an `inner` with moments in fields named"
            f" {fields}, got the state {type(state).__name__}; use Keep()"
        )
    arrays = [x for x in jax.tree.leaves(state) if x.ndim and x.dtype != jnp.uint32]
    moved = [x for x in jax.tree.leaves(groups) if x.ndim]
    if len(arrays) > len(moved):
        raise ValueError(
            f"`transport` {name} moves the fields {fields} of `inner`, got the state"
            f" {type(state).__name__}, which keeps other arrays too: they would stay in"
            " the old basis; use Keep()"
        )


def _shapes(tree: PyTree) -> list[tuple[int, ...]]:
    return [x.shape for x in jax.tree.leaves(tree)]
