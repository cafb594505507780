"""Updates of equal size in all directions, by Newton and Schulz."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flora_jax import _validation as check
from flora_jax._typing import PyTree
from flora_jax._xla import is_sharded, widened
from flora_jax.leaves.mesh import on_single_devices
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.rules import LeafRules
from flora_jax.leaves.trees import rebuild, run_sharded
from flora_jax.sketching.sketcher import refuse_sketches

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_NAME = "orthogonalize"
# Amsel et al.'s polynomials for singular values from 1e-3 on, one for each step; the
# last is Newton and Schulz's own for those near 1.
_COEFFICIENTS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.875, -1.25, 0.375),
)
_MARGIN = 1.005  # Roundings may exceed the interval, outside of which they grow.
_SMALL = 1e-30
_LEAST = 1e-20  # Largest entry of an update that makes a step of half the size.


@dataclasses.dataclass(frozen=True)
class NewtonSchulz:
    """An approximate polar factor, by odd polynomials of the singular values.

    X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X from X = U/‖U‖, with other coefficients in each
    step (Polar Express; X is divided by 1.005 before it, as a margin for roundings).
    After five steps singular values of at least 1e-3·‖U‖ lie between 0.86 and 1.13, and
    smaller ones below that, in their order. In bfloat16, as in float32 where the
    backend multiplies it in bfloat16 (a TPU, by default), that holds from 1e-2·‖U‖ on,
    and smaller ones may be off by up to 0.15.

    Attributes:
      steps: 5 as in Muon; 6 bring them within 0.01 of 1. The first ones alone, fewer
        than 5, leave them far from 1.
      dtype: of the iterates, ``"float32"`` or ``"bfloat16"``, which halves what each
        step reads and writes.

    Raises:
      TypeError: if ``steps`` is not an int.
      ValueError: if it is not positive, or for another dtype.

    Example:
      >>> import flora_jax as fj
      >>> tx = fj.orthogonalize(method=fj.NewtonSchulz(dtype="bfloat16"))

    References:
      Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025
    """

    takes_full_matrices: ClassVar[bool] = True

    steps: int = 5
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises on bad arguments."""
        check.check_positive_int("steps", self.steps, "5 is Muon's")
        check.check_choice("dtype", self.dtype, ("float32", "bfloat16"))

    def polar_factor(
        self, matrix: Float[Array, "*batch n m"]
    ) -> Float[Array, "*batch n m"]:
        """An approximation of P Qᵀ for each matrix P Σ Qᵀ; zero for zero."""
        tall = matrix.shape[-2] > matrix.shape[-1]
        x = jnp.swapaxes(matrix, -1, -2) if tall else matrix
        # By the largest entry first: squares of tiny or huge updates leave float32.
        x = x / jnp.maximum(jnp.max(jnp.abs(x), (-2, -1), keepdims=True), _SMALL)
        norm = jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True))
        # Of a matrix that is not zero it is at least 1.
        x = (x / jnp.maximum(norm, 1.0)).astype(self.dtype)
        powers = _MARGIN ** -np.array([1, 3, 5])
        coefficients = jnp.float32(np.multiply(_COEFFICIENTS, powers))

        eye = jnp.eye(x.shape[-2], dtype=jnp.float32)

        # Not on the Gram matrix alone ("Gram Newton-Schulz"), which takes 22 % fewer
        # operations at an aspect ratio of 2.7: with products of bfloat16 parts, as a
        # TPU's, small singular values then came out as large as 8, of TF32 as 1.8.
        def step(i: jax.Array, x: jax.Array) -> jax.Array:
            a, b, c = coefficients[jnp.minimum(i, len(_COEFFICIENTS) - 1)]
            gram = x @ jnp.swapaxes(x, -1, -2)
            # With a I in the small matrix, so that no pass over X adds a X.
            polynomial = a * eye + (b * gram + c * (gram @ gram))
            return polynomial.astype(x.dtype) @ x

        # Unrolled, no step copies X; but those of a sharded matrix take three times the
        # memory.
        unroll = not is_sharded()
        x = jax.lax.fori_loop(0, self.steps, step, x, unroll=unroll)
        x = x.astype(jnp.float32)
        return jnp.swapaxes(x, -1, -2) if tall else x


@dataclasses.dataclass(frozen=True)
class RowNormalization:
    """Columns of equal norm, in place of a polar factor (RMNP).

    U (UᵀU)^(-1/2), with the diagonal of UᵀU alone: for a kernel of shape (inputs,
    outputs) each output's weights get an update of the same norm. Those are the rows of
    the paper, whose weights have the other orientation. It has no matrix product, and
    on a mesh nothing but norms is sent.

    References:
      `RMNP: Row-Momentum Normalized Preconditioning
      <https://arxiv.org/abs/2603.20527>`_, 2026
    """

    takes_full_matrices: ClassVar[bool] = False

    def polar_factor(
        self, matrix: Float[Array, "*batch n m"]
    ) -> Float[Array, "*batch n m"]:
        """The matrix with columns of norm 1; zero for a column of zeros."""
        # By the largest entry first: squares of tiny or huge updates leave float32.
        largest = jnp.max(jnp.abs(matrix), -2, keepdims=True)
        x = matrix / jnp.maximum(largest, _SMALL)
        norm = jnp.sqrt(jnp.sum(x * x, -2, keepdims=True))
        # Of a column that is not zero it is at least 1.
        return x / jnp.maximum(norm, 1.0)


Method: TypeAlias = NewtonSchulz | RowNormalization


def orthogonalize(
    *,
    rms: jax.typing.ArrayLike = 0.2,
    method: Method = NewtonSchulz(),
    rules: LeafRules = LeafRules(),
) -> optax.GradientTransformationExtraArgs:
    """Replaces the updates of matrices by nearby matrices of equal singular values.

    For a leaf folded to U (n x m), with U = P Σ Qᵀ its singular value decomposition,

      U ← ρ √(n m) · P Qᵀ/‖P Qᵀ‖,

    which has a root mean square of ρ, whatever the rank of U. This is what Muon does to
    its momentum; a chain with a compressed optimizer before it needs a fraction of
    Muon's memory. The size of what comes in has no effect, unless its largest
    entry is near 1e-20 or smaller: weight decay and learning rate follow after it.

    Leaves that do not fold, or that the mask leaves out, pass as they are.

    Memory: no state. Work: about 20·m²·n multiplications and additions per matrix, m ≤
    n, against 6·n·m of a training step for each token; with
    :class:`flora_jax.RowNormalization` 4·n·m. For SUMO's step orthogonalize the
    moment in a subspace: give :func:`flora_jax.scale_in_subspace` the inner
    transformation ``optax.chain(optax.trace(0.95), fj.orthogonalize(...))``.

    Args:
      rms: ρ; 0.2 is about what Adam's updates have, so that one learning rate can serve
        these leaves and Adam's (Liu et al.).
      method: how P Qᵀ is approximated: :class:`flora_jax.NewtonSchulz`, or, at the
        price of a normalization, :class:`flora_jax.RowNormalization`.
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
    if not isinstance(method, NewtonSchulz | RowNormalization):
        raise TypeError(
            "`method` must be NewtonSchulz() or RowNormalization(), got"
            f" {method!r}; pass an instance"
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
    plan: LeafPlan, leaf: Float[Array, "..."], method: Method, rms: jax.Array
) -> Float[Array, "..."]:
    matrix = plan.fold(widened(leaf))
    if method.takes_full_matrices and plan.batch_axes and is_sharded():
        stack = matrix.reshape(-1, *matrix.shape[-2:])
        factor = on_single_devices(method.polar_factor, stack).reshape(matrix.shape)
    else:
        factor = method.polar_factor(matrix)
    # Of its own RMS: P Qᵀ has less than 1/√max(n, m) if some singular values are zero.
    size = jnp.sqrt(jnp.mean(factor * factor, (-2, -1), keepdims=True))
    largest = jnp.max(jnp.abs(matrix), (-2, -1), keepdims=True)
    kept = largest / (largest + _LEAST)
    new = rms * kept / jnp.maximum(size, _SMALL) * factor
    return plan.unfold(new, plan.shape).astype(leaf.dtype)
