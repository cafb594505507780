"""Ranks whose state fits a budget of bytes: one for all leaves, or one for each."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from flora_jax import _validation as check
from flora_jax._typing import PyTree, Shape
from flora_jax.leaves import boxes, paths
from flora_jax.leaves.moments import KINDS
from flora_jax.leaves.plan import LeafPlan
from flora_jax.leaves.trees import run_sharded
from flora_jax.sketching.sketch import Sketch, as_sketch

if TYPE_CHECKING:
    from jaxtyping import Array, Float


def rank_for_budget(
    make: Callable[[int], Any], params: PyTree, budget_bytes: int
) -> int:
    """Finds the largest rank for all leaves whose optimizer state fits a budget.

    The bytes are those of ``make(rank).init(params)``, counted without allocation:
    moments, stored bases, dense leaves, counters and keys. Parameters, gradients and
    activations are not included. At a rank of a leaf's width or more the leaf is dense:
    the largest rank that is tried is the width of the widest sketched side, at which
    nothing is sketched any more.

    A state grows with the rank until a leaf becomes dense, where the state of some
    optimizers shrinks (a basis is no longer stored): the search starts at the largest
    width whose state fits, and bisects up to the next. Where the parameters say how
    they are sharded (arrays, ShapeDtypeStructs with a sharding, flax's metadata under
    ``jax.set_mesh``), the rank is rounded down to a multiple of the shards of all
    sketched sides, so that every device holds its share of the sketches.

    Cost: one abstract evaluation of ``init`` for each width, and about log2 of the
    widest.

    Args:
      make: a callable from a rank to the transformation, for example
        ``lambda rank: fj.flora(1e-3, rank)``.
      params: parameters, or ShapeDtypeStructs of them.
      budget_bytes: largest size of the whole state in bytes, summed over devices.

    Returns:
      The rank. The widest side's size means that the budget holds the uncompressed
      state. A rank below the number of shards is not a multiple of it.

    Raises:
      TypeError: for arguments of a wrong type.
      ValueError: for a budget that rank 1 exceeds; for a ``make`` that sketches
        nothing.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import flora_jax as fj
      >>> params = {"w": jax.ShapeDtypeStruct((4096, 4096), jnp.float32)}
      >>> fj.rank_for_budget(lambda rank: fj.flora(1e-3, rank), params, 8 * 2**20)
      509
    """
    budget = _check_budget(budget_bytes, make)
    state = _state(make, 1, params)
    shapes = {path: leaf.shape for path, leaf in paths.named_leaves(params)}
    # A sketch of rank 1 keeps one of the sketched side's directions.
    sketched = {
        leaf.param: leaf.leaf.shape
        for leaf in paths.state_leaves(state, params)
        if leaf.param is not None and is_sketch(leaf, shapes)
    }
    widths = {
        math.prod(shapes[path]) // math.prod(shape) for path, shape in sketched.items()
    }
    if not widths:
        raise ValueError(
            "`make` must sketch some leaf of `params`, got a transformation that keeps"
            " all of them dense at rank 1; see flora_jax.plan_leaves for the reasons"
        )
    if tree_bytes(state) > budget:
        raise ValueError(
            "`budget_bytes` must hold the state at rank 1, which takes"
            f" {tree_bytes(state)} bytes, got budget_bytes={budget}; give more, sketch"
            " more leaves, or use an optimizer with less state for dense leaves"
        )

    def fits(rank: int) -> bool:
        return tree_bytes(_state(make, rank, params)) <= budget

    start = next(filter(fits, sorted(widths, reverse=True)), 1)
    end = min((width for width in widths if width > start), default=start + 1)
    rank = _bisect(start, end, fits)
    # At the end of its range nothing is sketched any more.
    shards = math.lcm(*_sketched_shards(params, sketched))
    divisible = rank - rank % shards
    return divisible if divisible and rank < max(widths) and fits(divisible) else rank


def _sketched_shards(params: PyTree, sketches: dict[str, Shape]) -> Iterator[int]:
    """Number of shards of each side that a sketch of rank 1 reduces."""
    for path, node in boxes.named_nodes(params):
        if path in sketches:
            sides = zip(jnp.shape(*jax.tree.leaves(node)), sketches[path], strict=True)
            reduced = tuple(i for i, (old, new) in enumerate(sides) if old != new)
            yield boxes.axis_shards(node, reduced)


def _bisect(good: int, bad: int, fits: Callable[[int], bool]) -> int:
    """The last that fits on the way from one that does to one that does not."""
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _check_budget(budget_bytes: Any, make: Any) -> int:
    """Returns the budget as an int; raises unless it is one and ``make`` callable."""
    budget = check.check_positive_int(
        "budget_bytes", budget_bytes, "pass whole bytes, for example 2 * 1024**3"
    )
    if not callable(make):
        raise TypeError(
            f"`make` must be a callable from ranks to a transformation, got {make!r};"
            " pass for example lambda rank: flora_jax.flora(1e-3, rank)"
        )
    return budget


def is_sketch(leaf: paths.StateLeaf, shapes: dict[str, Shape]) -> bool:
    """Whether an array of state is a sketch of the moment of a parameter.

    Args:
      leaf: the array.
      shapes: of the parameters, by path.
    """
    if leaf.param is None or leaf.field not in KINDS or paths.is_masked(leaf.leaf):
        return False
    shape, own = shapes[leaf.param], leaf.leaf.shape
    # A single element stands where a tree of state does not use a leaf.
    size = math.prod(own)
    return len(own) == len(shape) and size != math.prod(shape) and size > 1


def _state(make: Callable[[Any], Any], rank: Any, params: PyTree) -> PyTree:
    def init(params: PyTree) -> PyTree:  # With what `make` itself warns of.
        return check.check_transformation("make(rank)", make(rank)).init(params)

    return paths.abstract_state(init, params)


def tree_bytes(tree: PyTree) -> int:
    """Bytes of arrays, or of the shapes and dtypes of them."""
    return sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )


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
    surrounds the sketches too: stored bases, dense leaves, other dtypes. Once a k does
    not fit, no smaller one is tried except k = 0, the full rank of every leaf: a state
    that first grows and then shrinks with the rank may have room for more.

    The slices of a stacked leaf share one rank, and gradients of several steps give one
    rank: the mean of their s̃ decides. A matrix of zeros has no s̃ and is left out of
    the mean; a leaf of zeros alone gets rank 1, at k = 0 the full one. Where all s are
    equal, up to float32's rounding, no direction is preferred and s̃ falls evenly from 1
    to 0: the rank is about 1 − k of the full one.

    Cost: one float32 singular value decomposition of each matrix and step,
    O(n·m·min(n, m)), and one float32 copy of the current leaf; about log2 of the number
    of singular values abstract evaluations of ``init``. Run it once, before training.

    Args:
      params_or_grads: a tree of arrays: the parameters, or gradients, with their shapes
        and dtypes; or an iterator of such trees, for example a generator of the
        gradients of a few steps. It is consumed, one tree at a time.
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
    budget = _check_budget(budget_bytes, make)
    several = isinstance(params_or_grads, Iterator)
    params, plans, spectra = _average_spectra(
        params_or_grads if several else [params_or_grads], sketch
    )
    structure = jax.tree.structure(params)

    def size(ranks: list[int]) -> int:
        tree = jax.tree.unflatten(structure, ranks)
        return tree_bytes(_state(make, tree, params))

    smallest = size(_ranks(spectra, 1.0))
    if smallest > budget:
        raise ValueError(
            f"`budget_bytes` must hold the smallest state, which takes {smallest} bytes"
            f" (threshold 1, most ranks 1), got budget_bytes={budget}; give more, or"
            " sketch more: a smaller min_dim_size, a larger max_aspect_ratio, a mask"
            " that leaves out fewer leaves"
        )
    _check_unread(plans, _ranks(spectra, 1.0), smallest, size)
    # Ranks change at these only; the ends are named for trees without matrices.
    thresholds = np.unique(np.concatenate([[0.0, 1.0], *spectra]))

    def fits(i: int) -> bool:
        return size(_ranks(spectra, thresholds[i])) <= budget

    lowest = 0 if fits(0) else _bisect(len(thresholds) - 1, 0, fits)
    return jax.tree.unflatten(structure, _ranks(spectra, thresholds[lowest]))


def _ranks(spectra: list[np.ndarray], k: float) -> list[int]:
    """The number of s̃ >= k of each leaf, at least 1."""
    return [max(1, int((s >= k).sum())) for s in spectra]


def _check_unread(
    plans: Sequence[LeafPlan],
    ranks: list[int],
    known: int,
    size: Callable[[list[int]], int],
) -> None:
    """Raises if the rank of a leaf that is dense here decides anything in the state.

    Such a leaf would be sketched with rank 1, which is only a placeholder.
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
) -> tuple[PyTree, tuple[LeafPlan, ...], list[np.ndarray]]:
    """Mean of the s̃ of all steps and slices, by leaf.

    Args:
      trees: one tree of arrays per step, at least one.
      sketch: how leaves are folded.

    Returns:
      ShapeDtypeStructs of the tree, its plans, and one array of min(n, m) falling
      values in [0, 1] per leaf, none for dense ones.
    """
    params, plans, found = None, None, []
    for tree in trees:
        new = sketch.plan(tree)
        if plans is None:
            params, plans = jax.eval_shape(lambda tree: tree, tree), new
            found = [[] for _ in plans]
        if new != plans:
            differ = {(plan.path, plan.shape) for plan in {*new} ^ {*plans}}
            raise ValueError(
                "`params_or_grads` must give trees of the same leaves at every step,"
                f" got trees that differ in {sorted(differ)[:4]}; pass gradients of one"
                " model"
            )
        for plan, leaf, own in zip(plans, jax.tree.leaves(tree), found, strict=True):
            if not plan.dense:
                own.append(_normalize(_singular_values(plan, leaf)))
    if plans is None:
        raise ValueError(
            "`params_or_grads` must give one tree or more, got an iterator that is at"
            " its end; make a new one for each call"
        )
    return params, plans, [_mean(own) if own else np.zeros(0) for own in found]


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
