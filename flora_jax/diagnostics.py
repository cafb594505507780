"""How well sketches approximate gradients, and what is accumulated in them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree
from flora_jax.leaves.boxes import unboxed
from flora_jax.leaves.mesh import is_explicit
from flora_jax.sketching.sketcher import SketchEvent, refuse_sketches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_EXACT = jax.lax.Precision.HIGHEST  # Accelerators round products by default.


class LeafDiagnostics(NamedTuple):
    """Measurements of one sketched leaf at one step: float32; NaN where G is 0.

    With G what the transformation is given for the leaf, and G̃ the estimate from its
    sketch:

    Attributes:
      relative_error: ‖G̃ − G‖ / ‖G‖. Its square is (m+1)/r on average for Gaussian,
        m/r − 1 for CountSketch (where r divides m), Orthogonal and SRHT.
      cosine: between G̃ and G; 1/√(1 + (m+1)/r) and √(r/m) on average.
      effective_rank: (Σσ²)² / Σσ⁴ of the singular values σ of what is accumulated: the
        momentum, the accumulator, or for a subspace this step's sketch; the mean over
        the matrices of a stacked leaf. Between 1 and r; 0 where all is zero.
      momentum_ratio: ‖M‖ / (F·‖G‖) of a momentum, NaN of all else. F bounds a stable
        one, in the root of the mean square, for gradients of norm ‖G‖: it is 1 without
        resampling, with it max(1, √q (1−β^κ) / (1−√ρ)) where q = m/r and ρ = β^{2κ} q,
        infinite from ρ = 1 on. Ratios that stay above 1 mean gradients that shrink, or
        a momentum that its transfers blow up.
    """

    relative_error: Float[Array, ""]
    cosine: Float[Array, ""]
    effective_rank: Float[Array, ""]
    momentum_ratio: Float[Array, ""]


def diagnostics(
    tx: optax.GradientTransformation,
    state: PyTree,
    grads: PyTree,
    params: PyTree = None,
    *,
    every: int = 1,
    step: jax.typing.ArrayLike | None = None,
    **extra_args: Any,
) -> dict[str, dict[str, LeafDiagnostics]]:
    """Measures what the update of these gradients sketches, and how well; for logs.

    A pure function of the arguments of ``tx.update``, which it traces without using its
    results: call it inside ``jax.jit`` together with the update itself, and the
    compiler leaves out what neither needs. Each transformation of a chain is measured
    by what it is given: after ``scale_by_factored_rms`` the normalized gradient.

    The inner transformation of :func:`flora_jax.compressed_accumulation` is not
    measured. Nor are wrappers that run the update under ``lax.cond``
    (``optax.apply_if_finite``, ``optax.MultiSteps``): give their inner transformation
    with its state. On a mesh with Explicit axes call it inside of
    ``jax.sharding.auto_axes(…, out_sharding=jax.P())``.

    Cost: the estimate of each leaf, its norms, and an r x r matrix of products. With
    ``every=N`` it is paid in every N-th step only, by ``lax.cond``.

    Args:
      tx: a transformation that sketches, in any chain.
      state: its state, before the update; also that of an ``nnx.Optimizer``.
      grads: the gradients.
      params: the parameters, if ``tx`` needs them.
      every: measures when ``step`` is a multiple of it; NaN at other steps.
      step: index of the step, possibly traced; needed with ``every`` above 1.
      **extra_args: further arguments of ``tx.update``.

    Returns:
      By the transformation's name (a second one of the same name ends in ``_2``), and
      by path, for the leaves that are sketched.

    Raises:
      TypeError: for arguments of a wrong type, and for sketches in place of gradients.
      ValueError: if ``tx`` sketches nothing, or only inside ``lax.cond``; if ``step``
        is missing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> tx = fj.flora(1e-3, 32)
      >>> params = {"w": jnp.ones((256, 512))}
      >>> grads = {"w": jax.random.normal(jax.random.key(0), (256, 512))}
      >>> found = jax.jit(lambda *a: fj.diagnostics(tx, *a))(
      ...     tx.init(params), grads, params)
      >>> bool(abs(found["compressed_momentum"]["w"].cosine - (32 / 256) ** 0.5) < 0.02)
      True
    """
    tx = check.check_transformation("tx", tx, state)
    every = check.check_positive_int("every", every, "use 1 for all steps")
    if every > 1 and step is None:
        raise ValueError(
            f"`step` is missing, got every={every}; pass the index of the step"
        )
    refuse_sketches("diagnostics", grads, "they are compared with gradients", "grads")
    _refuse_explicit((grads, state, params))
    grads, state, params = unboxed((grads, state, params))

    def measure() -> dict[str, dict[str, LeafDiagnostics]]:
        seen: list[SketchEvent] = []
        tx.update(grads, state, params, on_sketch=seen.append, **extra_args)
        if not seen:
            raise ValueError(
                "`tx` must sketch some leaf of `grads`, got a transformation that keeps"
                " all of them dense; see flora_jax.plan_leaves for the reasons"
            )
        try:
            return _named(seen)
        except jax.errors.UnexpectedTracerError as error:
            raise ValueError(
                "`tx` must sketch outside of lax.cond, got one that does so inside,"
                " such as optax.apply_if_finite or optax.MultiSteps; give its inner"
                " transformation and that one's state"
            ) from error

    if every == 1:
        return measure()
    shapes = jax.eval_shape(measure)
    nothing = functools.partial(optax.tree.full_like, shapes, jnp.nan)
    return jax.lax.cond(jnp.asarray(step) % every == 0, measure, nothing)


def _refuse_explicit(trees: Any) -> None:
    # There the sketches are made inside of jax.sharding.auto_axes, out of sight.
    for sharding in (jax.typeof(x).sharding for x in jax.tree.leaves(trees)):
        if is_explicit(sharding):
            raise ValueError(
                "`grads`, `state` and `params` must not lie on a mesh with Explicit"
                f" axes, got {sharding.mesh.axis_names}; call diagnostics inside of"
                " jax.sharding.auto_axes, with out_sharding=jax.P()"
            )


def _named(seen: Sequence[SketchEvent]) -> dict[str, dict[str, LeafDiagnostics]]:
    """By transformation and path; a transformation sees each path once."""
    found: dict[str, dict[str, LeafDiagnostics]] = {}
    for leaf in seen:
        name, numbers = leaf.sketcher.name, itertools.count(2)
        while leaf.plan.path in found.setdefault(name, {}):
            name = f"{leaf.sketcher.name}_{next(numbers)}"
        found[name][leaf.plan.path] = _measure(leaf)
    return found


def _measure(leaf: SketchEvent) -> LeafDiagnostics:
    plan, given = leaf.plan, leaf.given.value()
    estimate = leaf.sketcher.unsketch_leaf(plan, leaf.sampled, leaf.sketch)
    norm, size = _norm(given), _norm(estimate)
    ratio = jnp.float32(jnp.nan)
    if leaf.largest is not None:
        isometric = leaf.sketcher.projection.normalization == "isometric"
        spread = (plan.width / plan.rank) ** 0.5 if isometric else 1.0
        ratio = spread * _norm(leaf.memory) / (leaf.largest * norm)
    return LeafDiagnostics(
        relative_error=_norm(estimate - given) / norm,
        cosine=jnp.vdot(estimate, given, precision=_EXACT) / (norm * size),
        effective_rank=_effective_rank(plan.fold(leaf.memory), plan.axis),
        momentum_ratio=ratio,
    )


def _norm(x: Float[Array, "..."]) -> Float[Array, ""]:
    return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32))))


def _effective_rank(sketch: Float[Array, "*batch n m"], axis: int) -> Float[Array, ""]:
    """Participation ratio of the squared singular values, by the r x r products."""
    x = sketch.astype(jnp.float32)
    x = jnp.swapaxes(x, -1, -2) if axis == -1 else x
    products = jnp.matmul(x, jnp.swapaxes(x, -1, -2), precision=_EXACT)
    trace = jnp.trace(products, axis1=-2, axis2=-1)
    squares = jnp.sum(jnp.square(products), (-2, -1))
    return jnp.mean(jnp.where(squares > 0, trace**2 / squares, 0.0))
