"""AdamW in a subspace: the papers that differ in its basis and what surrounds it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from flora_jax import _validation as check
from flora_jax.optimizers.common import DecayMask, adam, decay_and_learning_rate, recipe
from flora_jax.projections.base import Projection
from flora_jax.projections.count_sketch import CountSketch
from flora_jax.projections.gaussian import Gaussian
from flora_jax.projections.top_dct import TopDCT
from flora_jax.projections.top_svd import TopSVD
from flora_jax.quantization.quantize_state import quantize_state
from flora_jax.sketching.sketch import Sketch, resolve
from flora_jax.subspace.residuals import Apollo, Fira, Residual
from flora_jax.subspace.transform import scale_in_subspace
from flora_jax.subspace.transports import Keep, LDAdam, Reset, Squared, Transport
from flora_jax.transforms.orthogonalize import orthogonalize
from flora_jax.transforms.parts import chain_parts


def adamw_in_subspace(
    name: str,
    projection: Projection,
    *,
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    weight_decay: optax.ScalarOrSchedule | None,
    weight_decay_mask: DecayMask,
    state_dtype: str | None,
    residual: Any = None,
    transport: Any = Keep(),  # noqa: B008 (frozen)
    orthogonal: bool = False,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Adam on sketches, decoupled weight decay in the full space, the learning rate.

    Recipes hand on all of their own arguments, ``**locals()``.

    Args:
      name: the recipe's name, for messages.
      projection: for a sketch that has none.
      learning_rate: a float or a schedule.
      sketch: the user's sketch.
      b1: decay of the first moment, also for a residual or transport without decays.
      b2: decay of the second moment, likewise.
      eps: added to the square root of the second moment.
      weight_decay: multiplied by the learning rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: dtype of ``quantize_state`` for both moments; None for float32.
      residual: as in ``scale_in_subspace``.
      transport: likewise.
      orthogonal: whether the updates of matrices are orthogonalized.
      **settings: other arguments of ``scale_in_subspace``.

    Returns:
      The gradient transformation.
    """
    check.check_bool("orthogonal", orthogonal)
    sketch = resolve(sketch, projection, Projection)
    tx = scale_in_subspace(
        adam(b1, b2, eps),
        sketch,
        residual=_with_decays(residual, b1, b2),
        transport=_with_decays(transport, b1, b2),
        **settings,
    )
    if state_dtype is not None:
        error = ("error",) if settings.get("error_feedback") else ()
        tx = quantize_state(tx, state_dtype, fields=("mu", "nu", *error))
    last: list[Any] = [orthogonalize(rules=sketch.rules)] if orthogonal else []
    last += decay_and_learning_rate(weight_decay, weight_decay_mask, learning_rate)
    needs = "" if weight_decay is None else f"{name}(weight_decay)"
    return chain_parts((), tx, *last, params_for=needs)


def _with_decays(value: Any, b1: Any, b2: Any) -> Any:
    """A residual or transport that takes the recipe's decays where it has none."""
    if not isinstance(value, Fira | LDAdam | Reset):
        return value
    given = value.b1 is not None or value.b2 is not None
    return value if given else dataclasses.replace(value, b1=b1, b2=b2)


@recipe
def galore(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 0.25,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """GaLore: Adam on gradients projected to their leading singular vectors.

    Every T steps P becomes the r leading singular vectors of G on its smaller side.
    With R = PᵀG and Adam's direction N of it,

      W ← W − η (α P N + λ W).

    The moments are kept as they are when P changes. Leaves that are not sketched get
    AdamW. ``state_dtype="int8"`` is 8-bit GaLore.

    Memory: 2·r·max(n, m) elements for the moments (``side="smaller"``) and r·min(n, m)
    float32 ones for P, per sketched leaf.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper's pretraining.
      sketch: the sketch, or its rank; ``TopSVD()`` unless it has a projection. Its
        randomized method is much faster.
      refresh_every: updates between two bases T, 200 in the paper, 500 for 7B; None
        keeps the first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment; 1e-6 in the published code.
      scale: α, which multiplies the update of sketched leaves; 0.25 in the paper.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if ``params`` are needed and
        missing, or gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.galore(1e-2, fj.Sketch(32))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Zhao et al., `GaLore: Memory-Efficient LLM Training by Gradient Low-Rank
      Projection <https://arxiv.org/abs/2403.03507>`_, 2024
    """
    return adamw_in_subspace("galore", TopSVD(), **locals())


@recipe
def fira(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 0.25,
    residual: Residual = Fira(),  # noqa: B008 (frozen)
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Fira: Adam in a singular subspace, the rest of the gradient scaled to match.

    With P, R and N as in :func:`flora_jax.galore`, and ψ the direction N before its
    debiasing factor c = √(1−β2^t)/(1−β1^t),

      X = φ·(G − P R),   φ_j = ‖ψ_j‖/(‖R_j‖ + 1e-8) for each column j,
      X ← X / (max(‖X‖/(‖X_prev‖ + 1e-8), γ)/γ),
      W ← W − η (c·(α P ψ + X) + λ W).

    Where the last X was zero, as at the first step, X is not limited.

    Memory: as :func:`flora_jax.galore`, and one element per matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper's pretraining.
      sketch: the sketch, or its rank; ``TopSVD()`` unless it has a projection.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment; 1e-6 in the published code.
      scale: α, which multiplies the update of sketched leaves; 0.25 in the paper.
      residual: :class:`flora_jax.Fira` as in the paper, with its limiter γ and norms;
        :class:`flora_jax.FiraCode` takes G − α·P R, as the published code.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if ``params`` are needed and
        missing, or gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.fira(1e-2, fj.Sketch(32))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Chen et al., `Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank
      Constraint? <https://arxiv.org/abs/2410.01623>`_, 2024
    """
    return adamw_in_subspace("fira", TopSVD(), **locals())


@recipe
def apollo(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 1.0,
    residual: Residual = Apollo(),  # noqa: B008 (frozen)
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO: gradients scaled per channel by what Adam does to their sketches.

    A random P (r x m), regenerated from the key and replaced every T steps, gives R =
    P G. With Adam's direction N of it,

      s_j = ‖N_j‖/(‖R_j‖ + 1e-8) for each column j,   W ← W − η (√α G diag(s) + λ W),

    with the growth of ‖G diag(s)‖ limited as in :func:`flora_jax.fira` (limiting before
    or after √α is the same). A sketch sees √(r/m) of the gradient's Adam scale, which a
    larger ``scale`` or learning rate makes up for.

    Memory: 2·r·max(n, m) elements (``side="smaller"``) per sketched leaf, and one per
    matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper.
      sketch: the sketch, or its rank; ``Gaussian()``, the paper's, unless it has a
        projection.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment; 1e-6 in the published code.
      scale: α; 1 in the paper.
      residual: :class:`flora_jax.Apollo` with its limiter γ and norms, ``"channel"`` as
        above, or ``"tensor"``: one s per matrix.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if ``params`` are needed and
        missing, or gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.apollo(1e-2, fj.Sketch(32))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    # Before the root, which makes a complex number of a negative one.
    check.check_number("scale", scale, 0, None, "1 is the paper's")
    arguments: dict[str, Any] = {**locals(), "scale": scale**0.5}
    return adamw_in_subspace("apollo", Gaussian(), **arguments)


@recipe
def apollo_mini(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int = Sketch(1),  # noqa: B008 (frozen)
    *,
    refresh_every: int | jax.Array | None = 200,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-6,
    scale: jax.typing.ArrayLike = 128.0,
    residual: Residual = Apollo(norms="tensor"),  # noqa: B008 (frozen)
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: :func:`flora_jax.apollo` of rank 1, with one scale per matrix.

    Memory: 2·max(n, m) elements (``side="smaller"``) per sketched leaf, and one per
    matrix.

    Args:
      learning_rate: a float or a schedule; 0.01 in the paper.
      sketch: the sketch, or its rank; 1 in the paper.
      refresh_every: updates between two bases T, 200 in the paper; None keeps the
        first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment; 1e-6 in the published code.
      scale: α; 128 in the paper.
      residual: as in :func:`flora_jax.apollo`.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if ``params`` are needed and
        missing, or gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.apollo_mini(1e-2)
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Zhu et al., `APOLLO: SGD-like Memory, AdamW-level Performance
      <https://arxiv.org/abs/2412.05270>`_, 2024
    """
    return apollo(**locals())


@recipe
def dct_adamw(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 1,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    scale: jax.typing.ArrayLike = 1.0,
    error_feedback: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """DCT-AdamW: AdamW in the cosines in which each gradient is largest.

    Every T steps the basis becomes the r rows of the cosine transform of G's smaller
    side that have the largest norm; only their indices are kept. Moments of rows that
    stay are moved to their new places, those of new rows start at zero. With R the
    selected rows and N Adam's direction of them,

      W ← W − η (α Q_selectedᵀ N + λ W).

    With error feedback A = G + E takes G's place, and E ← A − Q_selectedᵀ R.

    Memory: 2·r·max(n, m) elements (``side="smaller"``) and r int32 ones per sketched
    leaf, and n·m with error feedback, a quarter of that in int8.

    Args:
      learning_rate: a float or a schedule.
      sketch: the sketch, or its rank; ``TopDCT()`` unless it has a projection, such as
        ``TopDCT(norm="l2")``.
      refresh_every: updates between two bases T; 1 in the paper; None keeps the first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α, which multiplies the update of sketched leaves.
      error_feedback: keep what the sketches leave out, and add it to the next gradient;
        in ``state_dtype``, if that is given.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if ``params`` are needed and
        missing, or gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.dct_adamw(1e-3, fj.Sketch(32))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      `SVD-Free Low-Rank Adaptive Gradient Optimization
      <https://arxiv.org/abs/2505.17967>`_, 2025
    """
    return adamw_in_subspace("dct_adamw", TopDCT(), transport=Squared(), **locals())


@recipe
def flora_adamw(
    learning_rate: optax.ScalarOrSchedule,
    sketch: Sketch | int,
    *,
    refresh_every: int | jax.Array | None = 100,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.99,
    eps: jax.typing.ArrayLike = 1e-8,
    scale: jax.typing.ArrayLike = 1.0,
    residual: Residual | None = Fira(),  # noqa: B008 (frozen)
    transport: Transport = Squared(),  # noqa: B008 (frozen)
    orthogonal: bool = False,
    weight_decay: optax.ScalarOrSchedule | None = None,
    weight_decay_mask: DecayMask = None,
    state_dtype: str | None = None,
    stagger: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """FLORA-AdamW: AdamW on sketches, the rest of the gradient scaled to match.

    The gradient is sketched by an isometry that a key regenerates, R = G Sᵀ; Adam runs
    on R, its direction N is expanded, and the part of G outside of the subspace is
    scaled as Adam scales the part inside, row by row, with limited growth (φ is that of
    :class:`flora_jax.Fira`):

      W ← W − η (N S + φ·(G − R S) + λ W).

    Every T steps S is replaced and the moments are transported. The update has full
    rank at every step. Leaves that are not sketched get AdamW: leave embeddings out by
    the sketch's mask.

    The learning rate: in runs of 400 updates two to four times AdamW's was best. With
    ``orthogonal=True`` it was eight to sixteen times, and four in runs of 4,000.

    Memory: 2·r·max(n, m) elements (``side="smaller"``) per sketched leaf, and one per
    matrix; a quarter of the former with ``state_dtype="int8"``.

    Args:
      learning_rate: a float or a schedule.
      sketch: the sketch, or its rank; ``CountSketch(normalization="isometric")`` unless
        it has a projection. ``Orthogonal`` decomposes anew at every step.
      refresh_every: updates between two bases T; None keeps the first.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the square root of the second moment.
      scale: α, which multiplies the update of sketched leaves.
      residual: what becomes of the part of G outside of the subspace; see
        :func:`flora_jax.scale_in_subspace`. Decays that it leaves open are b1 and b2.
      transport: what becomes of the moments when S changes, likewise.
      orthogonal: orthogonalize the updates of matrices, as Muon does; see
        :func:`flora_jax.orthogonalize` for its cost.
      weight_decay: decoupled weight decay in the full space, multiplied by the learning
        rate; None to disable.
      weight_decay_mask: as ``mask`` of ``optax.add_decayed_weights``.
      state_dtype: ``"int8"``, ``"float8_e4m3fn"`` or ``"bfloat16"`` for both moments,
        as by :func:`flora_jax.quantize_state`; None for float32.
      stagger: replace the bases of different leaves at different steps.

    Returns:
      The gradient transformation. Updates have the dtype of the gradients.

    Raises:
      TypeError: for arguments of a wrong type; from update, if the key was cast.
      ValueError: for arguments out of range; from update, if ``params`` are needed and
        missing, or gradients and state do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jnp.ones((256, 512))}
      >>> tx = fj.flora_adamw(1e-3, fj.Sketch(64))
      >>> updates, state = tx.update(params, tx.init(params))

    References:
      Hao et al., `FLORA: Low-Rank Adapters Are Secretly Gradient Compressors
      <https://arxiv.org/abs/2402.03293>`_, 2024; Chen et al., `Fira
      <https://arxiv.org/abs/2410.01623>`_, 2024; Robert et al., `LDAdam
      <https://arxiv.org/abs/2410.16103>`_, 2024
    """
    return adamw_in_subspace("flora_adamw", CountSketch("isometric"), **locals())
