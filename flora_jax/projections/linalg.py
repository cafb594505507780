"""Products and decompositions in forms that every backend compiles quickly."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import chex
import jax
import jax.numpy as jnp

from flora_jax._xla import is_sharded

if TYPE_CHECKING:
    from jaxtyping import Array, Float

_PASSES = 5
_LANES = 128  # Of a TPU's matrix unit.
_SHIFT = 1e-5  # Above what "high" leaves of a product on a TPU.


def product(
    x: jax.Array, right: jax.Array, axis: int, weights: jax.Array | None = None
) -> jax.Array:
    """X W R for axis -1, Rᵀ W X for axis -2, in float32.

    On a TPU to 2⁻¹⁶ of the entries: float32 in full takes six products of bfloat16
    parts, as long as all else that an optimizer's step does, and longer to compile;
    this takes three, one if both matrices are bfloat16, and in some cases two if one
    is, whose derivatives are products of bfloat16. On an NVIDIA GPU it takes three of
    TF32 parts, where tensor cores have these; but not with vectors.

    Args:
      x: X.
      right: R.
      axis: of X, which the product sums over.
      weights: the diagonal of W, float32; the identity if None.
    """
    chex.assert_axis_dimension(x, axis, right.shape[-2])
    weighed = weights is not None
    right = right * weights[..., None] if weighed else right
    narrow = [y.dtype == jnp.bfloat16 for y in (x, right)]
    if narrow != [True, False]:
        x = x.astype(jnp.float32)
    subscripts = "...nm,...mr->...nr" if axis == -1 else "...nm,...nr->...rm"
    multiply = functools.partial(jnp.einsum, subscripts)
    # By default accelerators round float32 to what they multiply, bfloat16 or TF32.
    on_tpu = functools.partial(multiply, precision="default" if all(narrow) else "high")
    # A product of less depth is bound by memory, of which the parts of X take some.
    # Parts of a stored R would take memory, too; those of W R are made as it is read.
    by_parts = narrow == [True, False] and weighed
    if narrow == [False, True]:
        by_parts = _LANES <= right.shape[-2] < right.shape[-1]
    # Of sharded matrices each part would need an all-reduce of its own.
    if by_parts and not is_sharded():
        on_tpu = functools.partial(_product_of_parts, multiply, axis)
    # Products with a vector, or of two, have nothing for tensor cores to do.
    on_cuda = "highest" if 1 in right.shape[-2:] else _float32_on_cuda()
    return jax.lax.platform_dependent(
        x,
        right,
        tpu=on_tpu,
        cuda=functools.partial(multiply, precision=on_cuda),
        default=functools.partial(multiply, precision="highest"),
    )


def _product_of_parts(
    multiply: Callable[..., jax.Array], axis: int, x: jax.Array, right: jax.Array
) -> jax.Array:
    """The product on a TPU of a bfloat16 and a float32 matrix, split into two parts."""
    of_x = right.dtype == jnp.bfloat16
    full = x if of_x else right
    # Not full.astype and back, which XLA takes for the matrix itself.
    high = jax.lax.reduce_precision(full, exponent_bits=8, mantissa_bits=7)
    high, low = (part.astype(jnp.bfloat16) for part in (high, full - high))
    multiply = functools.partial(multiply, precision="default")
    if of_x:
        x = jnp.concatenate((high, low), axis).astype(jnp.float32)
        return multiply(x, jnp.concatenate((right, right), -2))
    return multiply(x, high.astype(jnp.float32)) + multiply(x, low.astype(jnp.float32))


@functools.cache
def _float32_on_cuda() -> Any:
    """The fastest precision near float32 that the attached GPUs take, if there are any.

    Before Ampere (compute capability 8) the compiler refuses products of TF32 parts.
    """
    try:
        found = jax.devices("cuda")
    except RuntimeError:  # There are none, or it is not for those that are there.
        found = []
    majors = [int(x.compute_capability.partition(".")[0]) for x in found]
    if any(major < 8 for major in majors):
        return "highest"
    return jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3


def product_with_squares(
    s: Float[Array, "*batch r width"],
    matrix: Float[Array, "*batch n m"],
    weights: Float[Array, "*batch width"] | None,
    axis: int,
    weigh_s: bool,
) -> tuple[Float[Array, "*batch _ _"], Float[Array, "*batch _ _"]]:
    """G Sᵀ or S G, and the sums of squares of G along the axis.

    Args:
      s: S; the same for a batch, or with its axes.
      matrix: G, to be multiplied by the weights first.
      weights: one for each column of S, or None.
      axis: the sketched axis of G, -1 or -2.
      weigh_s: whether the product takes weighted S and G as it is, or S as it is and
        weighted G.
    """
    weighed = matrix.astype(jnp.float32)
    if weights is not None:
        weighed = weighed * along(weights, axis)
    pair = (matrix, weights) if weigh_s else (weighed, None)
    sketch = product(pair[0], s.swapaxes(-1, -2), axis, pair[1])
    return sketch, sums_of_squares(weighed, axis)


def along(vector: Float[Array, "*batch m"], axis: int) -> jax.Array:
    """Reshapes a vector so that it broadcasts along an axis of a matrix."""
    return jnp.expand_dims(vector, -3 - axis)


def sums_of_squares(x: Float[Array, "*batch n m"], axes: Any) -> jax.Array:
    """Of a matrix, along one or both of its axes, which have size 1 in the result."""
    if axes == -1:  # XLA on CPU sums products along rows twice as fast as squares.
        highest = jax.lax.Precision.HIGHEST
        return jnp.einsum("...nm,...nm->...n", x, x, precision=highest)[..., None]
    return jnp.sum(x * x, axes, keepdims=True)


def orthonormalized(x: Float[Array, "*batch n c"]) -> Float[Array, "*batch n c"]:
    """The factor Q of X = Q R, the diagonal of R positive, by Cholesky decompositions.

    X R⁻¹ with RᵀR = XᵀX, repeated, as rounding spoils it where X is ill-conditioned. A
    shift of all but the last XᵀX keeps these definite: each pass lifts small singular
    values by orders of magnitude, and the last finds them all near 1. Products and
    small matrices alone, where a TPU's compiler takes most of a minute for Householder
    reflections, and a mesh sums up XᵀX where it would gather X.

    Args:
      x: with columns of norms near 1, its condition number below about 1e6.

    References:
      Fukaya et al., `Shifted Cholesky QR for computing the QR factorization of
      ill-conditioned matrices <https://arxiv.org/abs/1809.11085>`_, 2020
    """
    columns = x.shape[-1]
    eye = jnp.eye(columns, dtype=jnp.float32)
    rounding = 4 * columns * jnp.finfo(jnp.float32).eps / 2

    def step(i: jax.Array, x: jax.Array) -> jax.Array:
        gram = product(x, x, -2)
        shift = jnp.where(i < _PASSES - 1, _SHIFT + rounding, 0.0)
        lower = jax.lax.linalg.cholesky(gram + shift * eye)
        # R⁻ᵀ alone is solved for: n right-hand sides take longer to compile.
        inverse = jax.lax.linalg.triangular_solve(
            lower, jnp.broadcast_to(eye, lower.shape), left_side=True, lower=True
        )
        return product(x, inverse.swapaxes(-1, -2), -1)

    return jax.lax.fori_loop(0, _PASSES, step, x)


def eigenvectors(x: Float[Array, "*batch c c"]) -> Float[Array, "*batch c c"]:
    """Of a symmetric matrix, by falling eigenvalue; by Jacobi's method on a TPU.

    There the default for more than 256 rows takes half a minute to compile.
    """
    eigh = jax.lax.linalg.eigh
    jacobi = jax.lax.linalg.EighImplementation.JACOBI
    rising = jax.lax.platform_dependent(
        x,
        tpu=lambda x: eigh(x, implementation=jacobi)[0],
        default=lambda x: eigh(x)[0],
    )
    return rising[..., ::-1]
