"""Updates of equal size in all directions, by Newton and Schulz."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree
from flora_jax._xla import widened
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.leaves.trees import rebuild, run_sharded
from flora_jax.sketching.sketcher import refuse_sketches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_NAME = "orthogonalize"
# Of Jordan's quintic: steep at zero, and within 0.68 to 1.21 after five steps.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_SMALL = 1e-30


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """An approximate polar factor, by an odd polynomial of the singular values.

    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X from X = U/‖U‖, with Jordan's coefficients: after
    five steps, singular values of at least 0.002 ‖U‖ lie between 0.68 and 1.21.

    Attributes:
      steps: of the polynomial; 5 in Muon.

    Raises:
      TypeError: if ``steps`` is not an int.
      ValueError: if it is not positive.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.orthogonalize(method=fj.NewtonSchulz(steps=6))
    """

    steps: int = 5

    def __post_init__(self) -> None:
        """Raises on bad arguments."""
        check.check_positive_int("steps", self.steps, "5 is Muon's")

    def polar_factor(
        self, matrix: Float[Array, "*batch n m"]
    ) -> Float[Array, "*batch n m"]:
        """An approximation of P Qᵀ for each matrix P Σ Qᵀ; zero for zero."""
        a, b, c = _COEFFICIENTS
        tall = matrix.shape[-2] > matrix.shape[-1]
        x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
        # By the largest entry first: squares of tiny or huge updates leave float32.
        x = x / jnp.maximum(jnp.max(jnp.abs(x), (-2, -1), keepdims=True), _SMALL)
        norm = jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
        x = x / jnp.maximum(norm, 1.0)  # Of a matrix that is not zero it is at least 1.

        def step(_: jax.Array, x: jax.Array) -> jax.Array:
            gram = x @ jnp.swapaxes(x, -1, -2)
            return a * x + (b * gram + c * (gram @ gram)) @ x

        # A loop: unrolled, the steps of a sharded matrix take three times the memory.
        x = jax.lax.fori_loop(0, self.steps, step, x)
        return jnp.swapaxes(x, -1, -2) if tall else x


def orthogonalize(
    *,
    rms: jax.typing.ArrayLike = 0.2,
    method: NewtonSchulz = NewtonSchulz(),
    rules: LeafRules = LeafRules(),
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of matrices by nearby matrices of equal singular values.

    For a leaf folded to U (n x m), with U = P Σ Qᵀ its singular value decomposition,

      U ← ρ √max(n, m) · P Qᵀ,

    which has a root mean square of ρ. This is what Muon does to its momentum; a chain
    with a compressed optimizer before it needs a fraction of Muon's memory. The size of
    what comes in has no effect: weight decay and learning rate follow after it.

    Leaves that do not fold, or that the mask leaves out, pass as they are.

    Memory: no state. Work: about 20·m²·n multiplications and additions per matrix, m ≤
    n, against 6·n·m of a training step for each token.

    Args:
      rms: ρ; 0.2 is about what Adam's updates have, so that one learning rate can serve
        these leaves and Adam's (Liu et al.).
      method: how P Qᵀ is approximated.
      rules: which leaves are matrices; leave embeddings out by its mask.

    Returns:
      The gradient transformation, without state. Updates keep their dtype.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for arguments out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> import flora_jax as fj
      >>> rules = fj.LeafRules(mask=fj.not_embeddings)
      >>> tx = optax.chain(
      ...     optax.trace(0.95, nesterov=True),
      ...     fj.orthogonalize(rules=rules),
      ...     optax.scale_by_learning_rate(1e-2))

    References:
      Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024; Liu et
      al., `Muon is Scalable for LLM Training <https://arxiv.org/abs/2502.16982>`_, 2025
    """
    check.check_number("rms", rms, 0, None, "0.2 is about that of Adam's updates")
    if not isinstance(method, NewtonSchulz):
        raise TypeError(
            f"`method` must be NewtonSchulz(), got {method!r}; pass an instance"
        )
    if not isinstance(rules, LeafRules):
        raise TypeError(f"`rules` must be LeafRules(), got {rules!r}; pass an instance")

    def orthogonalized(updates: PyTree, params: PyTree) -> PyTree:
        del params
        refuse_sketches(_NAME, updates, "it needs full matrices")
        plans, leaves = rules.plan(updates), jax.tree.leaves(updates)

        def run(leaves: list[jax.Array], rms: jax.Array) -> list[jax.Array]:
            return [
                leaf if plan.dense else _orthogonal(plan, leaf, method, rms)
                for plan, leaf in zip(plans, leaves, strict=True)
            ]

        # Products over a sharded side: an Explicit mesh would ask how each is placed.
        new = run_sharded(run, leaves, leaves, jnp.asarray(rms, jnp.float32))
        return rebuild(updates, new)

    def init_fn(params: PyTree) -> optax.EmptyState:
        rules.check_stacked(_NAME, rules.plan(params), params)
        return optax.EmptyState()

    tx = optax.stateless(orthogonalized)._replace(init=init_fn)
    return optax.with_extra_args_support(tx)


def _orthogonal(
    plan: LeafPlan, leaf: Float[Array, "..."], method: NewtonSchulz, rms: jax.Array
) -> Float[Array, "..."]:
    factor = method.polar_factor(plan.fold(widened(leaf)))
    new = rms * max(plan.rows, plan.columns) ** 0.5 * factor
    return plan.unfold(new, plan.shape).astype(leaf.dtype)
