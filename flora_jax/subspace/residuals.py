"""How the component of a gradient outside the subspace is handled."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as check
from flora_jax._xla import unshared, widened
from flora_jax.leaves.plan import LeafPlan
from flora_jax.projections.base import ObliviousProjection
from flora_jax.projections.linalg import sums_of_squares
from flora_jax.sketching.sketcher import Sketcher

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# A leaf's update in its shape, float32, and the norm that the next one is limited by.
Update: TypeAlias = "tuple[Float[Array, '...'], jax.Array | None]"
NORMS = ("channel", "tensor")
_SMALL = 1e-8  # Added to norms that are divided by, as the papers do.
_LEAST = 1 / 8  # Of what a random sketch is expected to see of a row's norm.
_ROUNDING = 2.0**-19  # Of ‖G‖²: what float32 cannot tell from none, 16 roundings.


class LeafStep(NamedTuple):
    """One sketched leaf at one update.

    Attributes:
      sketcher: the settings of the sketch.
      plan: the leaf's plan.
      grad: G.
      sampled: what determines S.
      sketch: R, in the state's shape, float32.
      squares: sums of squares of G along its sketched side, whose axes have size 1.
      direction: N, the inner transformation's update, in the state's shape, float32.
      scale: α.
      correction: what :meth:`Residual.correction` gave.
      residual_norm: norm of the last residual, one per matrix; None without limiter.
    """

    sketcher: Sketcher
    plan: LeafPlan
    grad: Float[Array, "..."]
    sampled: Any
    sketch: Float[Array, "..."]
    squares: Float[Array, "..."]
    direction: Float[Array, "..."]
    scale: Any
    correction: Any
    residual_norm: jax.Array | None

    def expanded(self, sketch: Float[Array, "..."]) -> Float[Array, "..."]:
        """C S for a sketch C in the state's shape."""
        return self.sketcher.unsketch_leaf(self.plan, self.sampled, sketch)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Residual:
    """Base class of residuals, and the one of None: the update is α·N S (GaLore).

    Residuals are frozen objects, and pytrees of their hyperparameters, which may be
    traced. They are deliberately not callable: ``optax.inject_hyperparams`` treats
    callable arguments as schedules. To write one, subclass it as a frozen dataclass
    registered by ``jax.tree_util.register_dataclass``, override :meth:`update`, and set
    ``needs_isometry`` and ``is_partial``.

    Attributes:
      needs_isometry: whether S has to have orthonormal rows.
      is_partial: whether the update leaves out what the sketch does not see, so that
        error feedback has something to add.
    """

    needs_isometry: ClassVar[bool] = False
    is_partial: ClassVar[bool] = True

    @property
    def is_limited(self) -> bool:
        """Whether the state keeps the norm of the last residual."""
        return False

    def check(self) -> None:
        """Raises on bad hyperparameters; pytrees are rebuilt from any leaves."""

    def correction(self, count: Any) -> Any:
        """The factor that the inner transformation's debiasing puts into N."""
        del count
        return 1.0

    def update(self, leaf: LeafStep) -> Update:
        """One sketched leaf's update in the full space, and its ``residual_norm``."""
        return leaf.expanded(leaf.scale * leaf.direction), leaf.residual_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plain(Residual):
    """The update is α·N S + (G − R S): outside the subspace the plain gradient.

    Example:
      >>> import optax
      >>> import flora_jax as fj
      >>> tx = fj.scale_in_subspace(
      ...     optax.scale_by_adam(), fj.Sketch(32), residual=fj.Plain())
    """

    needs_isometry: ClassVar[bool] = True
    is_partial: ClassVar[bool] = False

    def update(self, leaf: LeafStep) -> Update:
        """See :meth:`Residual.update`."""
        inside = leaf.expanded(leaf.scale * leaf.direction - leaf.sketch)
        return widened(leaf.grad) + inside, leaf.residual_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fira(Residual):
    """The update is α·N S + φ·(G − R S): the residual, scaled as Adam would.

    φ_i = ‖N_i‖/(‖R_i‖ + 1e-8) for each row i of R (n x r). With an oblivious
    projection ‖R_i‖ is taken for at least √(r/m)·‖G_i‖/8: a row that cancels in its
    sketch would otherwise have a boundless φ.

    With a limiter γ, X = φ·(G − R S) without ``inner``'s debiasing factor is divided by
    max(‖X‖/(‖X_prev‖ + 1e-8), γ)/γ, where X_prev is what was applied before. Where that
    is zero, as at the first step, X is not limited.

    Memory: one element per matrix with a limiter.

    Attributes:
      limiter: γ > 0; 1.01 in the paper; None to disable.
      norms: ``"channel"`` as above, or ``"tensor"``: one φ per matrix.
      b1: decay β1 with which ``inner`` debiases its first moment as Adam does; None if
        it does not. Recipes fill in their own.
      b2: the same of its second moment.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.fira(1e-2, fj.Sketch(32), residual=fj.Fira(limiter=None))

    References:
      Chen et al., `Fira <https://arxiv.org/abs/2410.01623>`_, 2024
    """

    limiter: Any = 1.01
    norms: str = dataclasses.field(default="channel", metadata={"static": True})
    b1: Any = None
    b2: Any = None

    needs_isometry: ClassVar[bool] = True
    is_partial: ClassVar[bool] = False

    @property
    def is_limited(self) -> bool:
        """Whether the state keeps the norm of the last residual."""
        return self.limiter is not None

    def check(self) -> None:
        """Raises on settings out of range."""
        check.check_choice("norms", self.norms, NORMS)
        if self.limiter is not None:
            check.check_number(
                "limiter", self.limiter, 1e-30, None, "1.01, or None to disable"
            )
        check_decays(self)

    def correction(self, count: Any) -> Any:
        """√(1−β2^t)/(1−β1^t) at the step t that follows ``count`` others."""
        if self.b1 is None:
            return 1.0
        step = optax.safe_increment(count)
        return jnp.sqrt(1 - self.b2**step) / (1 - self.b1**step)

    def share(self, scale: Any) -> Any:
        """What multiple of R S the residual leaves out of G."""
        del scale
        return 1.0

    def update(self, leaf: LeafStep) -> Update:
        """See :meth:`Residual.update`.

        It is computed as φ·G + (α·N − p·φ·R) S, p the share that is left out: nothing
        of the leaf's size is made but the update itself.
        """
        plan, previous = leaf.plan, leaf.residual_norm
        g, r, n = map(plan.fold, (widened(leaf.grad), leaf.sketch, leaf.direction))
        factor, share = self._factor(leaf, r, n), self.share(leaf.scale)
        if previous is not None:
            # ‖G − p·R S‖² per row, as S has orthonormal rows where p > 0. A residual of
            # roundings counts as none: it would hold back what follows it.
            full = plan.fold(leaf.squares)
            left = full - share * (2 - share) * sums_of_squares(r, plan.axis)
            left = jnp.where(left > _ROUNDING * full, left, 0.0)
            norm = jnp.sum(factor**2 * left, (-2, -1), keepdims=True)
            norm, old = jnp.sqrt(norm) / leaf.correction, plan.fold(previous)
            growth = jnp.maximum(norm / (old + _SMALL), self.limiter) / self.limiter
            growth = jnp.where(old > 0, growth, 1.0)  # A first step is not limited.
            factor = factor / growth
            previous = plan.unfold(norm / growth, previous.shape)
        update = plan.unfold(factor * g, plan.shape)
        if self.needs_isometry:
            inside = leaf.scale * n - share * factor * r
            update += leaf.expanded(plan.unfold(inside, plan.state_shape))
        return update, previous

    def _factor(self, leaf: LeafStep, r: Any, n: Any) -> jax.Array:
        """What the residual is multiplied by: φ."""
        plan, axes = leaf.plan, self._axes(leaf.plan)
        seen = jnp.sqrt(sums_of_squares(r, axes))
        projection = leaf.sketcher.projection
        if isinstance(projection, ObliviousProjection):
            # A row may cancel in a random sketch, which then says nothing of its scale.
            expected = 1.0
            if projection.normalization == "isometric":
                expected = (plan.rank / plan.width) ** 0.5
            # Or XLA on CPU would write G∘G, of which it would take this sum as well.
            full = unshared(plan.fold(leaf.squares))
            if self.norms == "tensor":
                full = jnp.sum(full, (-2, -1), keepdims=True)
            seen = jnp.maximum(seen, _LEAST * expected * jnp.sqrt(full))
        return jnp.sqrt(sums_of_squares(n, axes)) / (seen + _SMALL)

    def _axes(self, plan: LeafPlan) -> Any:
        return plan.axis if self.norms == "channel" else (-2, -1)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FiraCode(Fira):
    """The update is α·N S + φ·(G − α·R S), as in the code published with Fira.

    It leaves a part of R in the residual unless α is 1; otherwise it is :class:`Fira`.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.fira(1e-2, fj.Sketch(32), residual=fj.FiraCode())
    """

    def share(self, scale: Any) -> Any:
        """What multiple of R S the residual leaves out of G."""
        return scale


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Apollo(Fira):
    """The update is α·φ·G: the gradient itself, scaled as Adam would.

    φ and its limiter are those of :class:`Fira`; where S has no orthonormal rows but
    E[SᵀS] = I, ‖R_i‖ is taken for at least ‖G_i‖/8.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.apollo(1e-2, fj.Sketch(32), residual=fj.Apollo(norms="tensor"))

    References:
      Zhu et al., `APOLLO <https://arxiv.org/abs/2412.05270>`_, 2024
    """

    needs_isometry: ClassVar[bool] = False

    def share(self, scale: Any) -> Any:
        """None of R S is left out."""
        del scale
        return 0.0

    def _factor(self, leaf: LeafStep, r: Any, n: Any) -> jax.Array:
        """What the gradient is multiplied by: α·φ."""
        return leaf.scale * super()._factor(leaf, r, n)


def check_decays(owner: Any) -> None:
    """Raises unless ``b1`` and ``b2`` are both decays or both None."""
    if (owner.b1 is None) != (owner.b2 is None):
        raise ValueError(
            f"`b1` and `b2` must be given together, got {owner}; pass the decays of"
            " `inner`, such as b1=0.9, b2=0.999, or neither if it does not debias"
        )
    for name, beta in (("b1", owner.b1), ("b2", owner.b2)):
        if beta is not None:
            check.check_number(name, beta, 0, 1, "Adam's defaults are 0.9 and 0.999")
