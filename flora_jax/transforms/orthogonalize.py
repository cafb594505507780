"""Updates of equal size in all directions, by Newton and Schulz."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as _checks
from flora_jax.leaves import mesh as _mesh
from flora_jax.leaves import trees as _state
from flora_jax.leaves.rules import LeafRules
from flora_jax.transforms.parts import widened
from flora_jax.sketching.sketched_gradients import refuse_sketches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

# Of Jordan's quintic: steep at zero, and within 0.68 to 1.21 after five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALL = 1e-30


def orthogonalize(
    *,
    steps: int = 5,
    rms: jax.typing.ArrayLike = 0.2,
    mask: Any = None,
    min_dim_size: int = 128,
    max_aspect_ratio: float = 16,
    weight_dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of matrices by nearby matrices of equal singular values.

    For a leaf folded to U (n x m), with U = P Σ Qᵀ its singular value decomposition,

      U ← ρ √max(n, m) · P Qᵀ,

    which has a root mean square of ρ. P Qᵀ is approximated by five steps of an odd
    polynomial, X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X from X = U/‖U‖: singular values of at
    least 0.002 ‖U‖ end between 0.68 and 1.21. This is what Muon does to its momentum; a
    chain with a compressed optimizer before it needs a fraction of Muon's memory. The
    size of what comes in has no effect: weight decay and learning rate follow after it.

    Leaves that do not fold, or that the mask leaves out, pass as they are.

    Memory: none is kept. Work: about 20·m²·n multiplications and additions per matrix,
    m ≤ n, which is little beside a training step of many tokens: 6·n·m for each.

    Args:
      steps: of the polynomial; 5 in Muon.
      rms: ρ; 0.2 is about what Adam's updates have, so that one learning rate can serve
        these leaves and Adam's (Liu et al.).
      mask: which leaves may be treated so; see :func:`flora_jax.plan_leaves`. Leave
        embeddings out.
      min_dim_size: smallest side of a matrix that is treated so.
      max_aspect_ratio: largest ratio of its sides.
      weight_dimension_numbers: which axes form the matrix, in optax's convention.

    Returns:
      The gradient transformation, without state. Updates keep their dtype.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> tx = optax.chain(
      ...     fj.scale_in_subspace(
      ...         optax.scale_by_adam(), fj.CountSketch(scale="isometric"), rank=32,
      ...         residual="fira", transport="squared"),
      ...     fj.orthogonalize(),
      ...     optax.scale_by_learning_rate(1e-2))

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et
      al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025
    """
    _checks.check_positive_int("steps", steps, "5 is Muon's")
    _checks.check_number("rms", rms, 0, None, "0.2 is about that of Adam's updates")
    # Any rank: what is sketched to as much as its width is a matrix too.
    rules = LeafRules(
        1,
        mask,
        min_dim_size,
        max_aspect_ratio,
        weight_dimension_numbers=weight_dimension_numbers,
    )

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra: Any
    ) -> tuple[Any, Any]:
        del params, extra
        refuse_sketches("orthogonalize", updates, "it needs whole matrices")
        plans, leaves = rules.plan(updates), jax.tree.leaves(updates)

        def run(leaves: Any, rms: Any) -> Any:
            return [
                leaf if plan.dense_reason else _treat(plan, leaf, steps, rms)
                for plan, leaf in zip(plans, leaves, strict=True)
            ]

        # Products over a side that is cut: an Explicit mesh would ask how each lies.
        new = _state.run_sharded(run, leaves, leaves, jnp.asarray(rms, jnp.float32))
        return _state.rebuild(updates, new), state

    return optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(), update_fn
    )


def _treat(plan: Any, leaf: jax.Array, steps: int, rms: jax.Array) -> jax.Array:
    matrix = plan.fold(widened(leaf))
    new = rms * max(plan.rows, plan.columns) ** 0.5 * newton_schulz(matrix, steps)
    return plan.unfold(new, plan.shape).astype(leaf.dtype)


def newton_schulz(
    matrix: Float[Array, "*batch n m"], steps: int
) -> Float[Array, "*batch n m"]:
    """An approximation of P Qᵀ for each matrix P Σ Qᵀ; zero for zero."""
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
    # Gathered once if at all: every step wants products of all pairs of rows.
    x = _mesh.whole_along(x, -2)
    # By the largest entry first: squares of tiny or huge updates leave float32.
    x = x / jnp.maximum(jnp.max(jnp.abs(x), (-2, -1), keepdims=True), _SMALL)
    norm = jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
    x = x / jnp.maximum(norm, 1.0)  # Of a matrix that is not zero it is at least 1.
    for _ in range(steps):
        gram = x @ jnp.swapaxes(x, -1, -2)
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return jnp.swapaxes(x, -1, -2) if tall else x
