"""One rank per layer, from singular spectra and a budget of bytes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flora_jax._typing import PyTree
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.trees import run_sharded
from flora_jax.memory.budget import check_budget, state_bytes
from flora_jax.sketching.sketch import Sketch, as_sketch

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def ranks_for_budget(
    params_or_grads: PyTree | Iterator[PyTree],
    budget_bytes: int,
    make: Callable[[PyTree], Any],
    sketch: Sketch | int = 1,
) -> PyTree:
    """Chooses a rank for every leaf, so that the optimizer's state fits a budget.

    The singular values s of a leaf, folded to a matrix, are normalized to

      s̃ = (s − min s) / (max s − min s),

    and its rank is the number of s̃ >= k, with one threshold k in [0, 1] for all leaves.
    A spectrum that falls fast thus gets a small rank, a flat one a large rank. k is the
    lowest that bisection over all s̃ finds whose state fits. The bytes are those of
    ``make(ranks).init``, counted without allocation, so they are right for what
    surrounds the sketches too: stored bases, dense leaves, other dtypes. Below a k that
    does not fit nothing is tried, except k = 0, the full rank of every leaf: a state
    that first grows and then shrinks with the rank may have room for more.

    The slices of a stacked leaf share one rank, and gradients of several steps give one
    rank: the mean of their s̃ decides. A matrix of zeros has no s̃ and is left out of
    the mean; a leaf of zeros alone gets rank 1, at k = 0 the full one. Where all s are
    equal, up to float32's rounding, no direction is preferred and s̃ falls evenly from 1
    to 0: the rank is about 1 − k of the full one.

    Cost: one float32 singular value decomposition of each matrix and step,
    O(n·m·min(n, m)), and one float32 copy of the leaf in hand; about log2 of the number
    of singular values abstract evaluations of ``init``. Run it once, before training.

    Args:
      params_or_grads: a tree of arrays: the parameters, or gradients, with their shapes
        and dtypes; or an iterator of such trees, for example a generator of the
        gradients of a few steps. It is read to its end, one tree at a time.
      budget_bytes: largest size of the whole state in bytes, summed over devices.
      make: a callable from a tree of ranks to the transformation, for example
        ``lambda ranks: fj.flora(1e-3, fj.Sketch(ranks, mask=fj.not_embeddings))``.
      sketch: says which leaves are sketched and how they fold; its rank is not read.
        Give it what ``make`` gives its own but the rank, for example
        ``fj.Sketch(1, mask=fj.not_embeddings)``.

    Returns:
      A tree of ints with the structure of the parameters, which
      :class:`flora_jax.Sketch` takes as its rank. Leaves that are kept dense have 1,
      which is not read; those with all directions have the full rank, with which they
      are kept dense.

    Raises:
      TypeError: for arguments of a wrong type, and for leaves without values.
      ValueError: for a budget that the smallest state exceeds; for leaves that are not
        finite; for trees that differ from step to step; for a ``make`` that sketches a
        leaf that ``sketch`` leaves out.

    Example:
      >>> import jax
      >>> import flora_jax as fj
      >>> flat = jax.random.normal(jax.random.key(0), (128, 128))
      >>> params = {"flat": flat, "steep": flat @ flat @ flat}
      >>> make = lambda ranks: fj.flora(1e-3, fj.Sketch(ranks))
      >>> ranks = fj.ranks_for_budget(params, 64 * 2**10, make)
      >>> bool(ranks["flat"] > 2 * ranks["steep"])
      True
      >>> state = make(ranks).init(params)
      >>> sum(leaf.nbytes for leaf in jax.tree.leaves(state)) <= 64 * 2**10
      True

    References:
      Jaiswal et al., `From GaLore to WeLore: How Low-Rank Weights Non-uniformly Emerge
      from Low-Rank Gradients <https://arxiv.org/abs/2407.11239>`_, 2024
    """
    # At rank 1 all that folds is sketched: only the folds are used.
    sketch = dataclasses.replace(as_sketch(sketch), rank=1)
    budget = check_budget(budget_bytes, make)
    several = isinstance(params_or_grads, Iterator)
    params, plans, spectra = _average_spectra(
        params_or_grads if several else [params_or_grads], sketch
    )
    structure = jax.tree.structure(params)

    def size(ranks: list[int]) -> int:
        return state_bytes(make, jax.tree.unflatten(structure, ranks), params)

    smallest = size(_ranks(spectra, 1.0))
    if smallest > budget:
        raise ValueError(
            f"`budget_bytes` must hold the smallest state, which takes {smallest} bytes"
            f" (threshold 1, most ranks 1), got budget_bytes={budget}; give more, or"
            " sketch more: a smaller min_dim_size, a larger max_aspect_ratio, a mask"
            " that leaves out fewer leaves"
        )
    _check_unread(plans, _ranks(spectra, 1.0), smallest, size)
    return jax.tree.unflatten(structure, _bisect(spectra, budget, size))


def _bisect(
    spectra: list[np.ndarray | None], budget: int, size: Callable[[list[int]], int]
) -> list[int]:
    """Ranks at the lowest threshold found to fit; those at threshold 1 are known to."""
    # Ranks change at these only; the ends are named for trees without matrices.
    ks = np.unique(np.concatenate([[0.0, 1.0], *(s for s in spectra if s is not None)]))
    if size(_ranks(spectra, 0.0)) <= budget:
        return _ranks(spectra, 0.0)
    too_low, fits = 0, len(ks) - 1
    while fits - too_low > 1:
        middle = (too_low + fits) // 2
        if size(_ranks(spectra, ks[middle])) <= budget:
            fits = middle
        else:
            too_low = middle
    return _ranks(spectra, ks[fits])


def _ranks(spectra: list[np.ndarray | None], k: float) -> list[int]:
    """The number of s̃ >= k of each leaf, at least 1."""
    return [1 if s is None else max(1, int((s >= k).sum())) for s in spectra]


def _check_unread(
    plans: Sequence[LeafPlan],
    ranks: list[int],
    known: int,
    size: Callable[[list[int]], int],
) -> None:
    """Raises if the rank of a leaf that is dense here decides anything in the state.

    Such a leaf would be sketched with the rank 1 that stands for nothing.
    """
    dense = [i for i, plan in enumerate(plans) if plan.dense]

    def is_read(members: list[int]) -> bool:
        full = list(ranks)
        for i in members:
            full[i] = max(1, math.prod(plans[i].shape))  # Dense by any side.
        return size(full) != known

    if dense and is_read(dense):
        plan = next(plans[i] for i in dense if is_read([i]))
        raise ValueError(
            "`make` must keep dense what ranks_for_budget keeps dense, got one that"
            f" sketches leaf {plan.path!r} of shape {plan.shape}, here dense because"
            f" {plan.dense_reason}; give it the same sketch but for the rank"
        )


def _average_spectra(
    trees: Iterable[PyTree], sketch: Sketch
) -> tuple[PyTree, tuple[LeafPlan, ...], list[np.ndarray | None]]:
    """Mean of the s̃ of all steps and slices, by leaf.

    Args:
      trees: one tree of arrays per step, at least one.
      sketch: how leaves are folded.

    Returns:
      ShapeDtypeStructs of the tree, its plans, and one array of min(n, m) falling
      values in [0, 1] per leaf, None for dense ones.
    """
    params, plans, found = None, None, []
    for tree in trees:
        new = sketch.plan(tree)
        if plans is None:
            params, plans = jax.eval_shape(lambda tree: tree, tree), new
            found = [[] for _ in plans]
        if new != plans:
            differ = {(p.path, p.shape) for p in new} ^ {
                (p.path, p.shape) for p in plans
            }
            raise ValueError(
                "`params_or_grads` must give trees of the same leaves at every step,"
                f" got trees that differ in {sorted(differ)[:4]}; pass gradients of one"
                " model"
            )
        for plan, leaf, spectra in zip(
            plans, jax.tree.leaves(tree), found, strict=True
        ):
            if not plan.dense:
                spectra.append(_normalize(_singular_values(plan, leaf)))
    if plans is None:
        raise ValueError(
            "`params_or_grads` must give one tree or more, got an iterator that is at"
            " its end; make a new one for each call"
        )
    return params, plans, [_mean(spectra) if spectra else None for spectra in found]


def _mean(spectra: list[np.ndarray]) -> np.ndarray:
    """Mean over steps and slices; zeros if all matrices are, so that rank is 1."""
    rows = np.concatenate(spectra)
    return rows.mean(axis=0) if len(rows) else np.zeros(rows.shape[1])


def _singular_values(plan: LeafPlan, leaf: Any) -> np.ndarray:
    """Singular values of each slice of a leaf, falling: (slices, min(n, m))."""
    if isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise TypeError(
            f"leaf {plan.path!r} must be an array with values, got {leaf}; call"
            " ranks_for_budget outside of jit, with parameters or gradients"
        )

    def decompose(leaf: Array) -> Float[Array, "slices p"]:
        matrices = plan.fold(leaf.astype(jnp.float32))
        s = jnp.linalg.svd(matrices, compute_uv=False)
        # Not every backend ends in NaN where the matrix is not finite.
        return jnp.where(jnp.isfinite(matrices).all(), s, jnp.nan).reshape(-1, p)

    p = min(plan.rows, plan.columns)
    slices = math.prod(plan.shape[i] for i in plan.batch_axes)
    like = jnp.zeros((slices, p), jnp.float32)
    s = np.asarray(run_sharded(decompose, like, jnp.asarray(leaf)), np.float64)
    if not np.isfinite(s).all():
        raise ValueError(
            f"leaf {plan.path!r} must have finite singular values, got NaN or infinity;"
            " leave out steps whose gradients overflow"
        )
    return s


def _normalize(s: np.ndarray) -> np.ndarray:
    """s̃ = (s − min)/(max − min) of each row that is not all zeros.

    Args:
      s: falling singular values, shape (slices, p).

    Returns:
      Shape (slices that are not zero, p); evenly from 1 to 0 where all s are equal.
    """
    s = s[s[:, 0] > 0]
    high, spread = s[:, :1], s[:, :1] - s[:, -1:]
    equal = spread <= s.shape[1] * np.finfo(np.float32).eps * high
    even = np.linspace(1.0, 0.0, s.shape[1])
    return np.where(equal, even, (s - s[:, -1:]) / np.where(equal, 1.0, spread))
