"""The bases that the oracles of subspaces take, and runs that compile quickly."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

import flora_jax as fj
from flora_jax.random.keys import leaf_keys
from tests.reference import dct, folds

NAME = "scale_in_subspace"


@functools.cache
def _compiled(projection, rank, width):
    """(key data, path, epoch) -> S; operation by operation it would compile more."""

    @functools.partial(jax.jit, static_argnums=1)
    def matrix(root, path, epoch):
        (key,) = leaf_keys(root, NAME, [path], epoch)
        return projection.matrix(key, rank, width)

    return matrix


def regenerated(projection, seed, path, rank, width):
    """epoch -> S of a leaf, as the library samples it."""
    matrix, root = _compiled(projection, rank, width), jnp.array([0, seed], jnp.uint32)
    return lambda epoch: np.asarray(matrix(root, path, epoch), np.float64)


def singular_vectors(gradient, rank, left):
    """numpy's, with the signs that the library's decomposition gives them.

    Signs are a convention, but moments that are kept over a refresh depend on it.
    """
    u, _, vt = np.linalg.svd(np.asarray(gradient, np.float64), full_matrices=False)
    theirs, _, across = jnp.linalg.svd(jnp.float32(gradient), full_matrices=False)
    s, like = (u.T, theirs.T) if left else (vt, across)
    signs = np.sign(np.sum(s * np.asarray(like, np.float64), axis=1))
    return (s * signs[:, None])[:rank]


def cosines(norm):
    """The rows of the cosine transform that the oracle selects."""

    def choose(gradient, rank, left):
        g = gradient if left else gradient.T
        return dct.dct_matrix(len(g))[dct.top_rows(g, rank, norm)]

    return choose


def basis_of(projection, seed, name, side, every, offset=0):
    """(step, gradient) -> S of a leaf of ``folds``, or None to keep the last.

    offset: by how many steps the leaf is ahead.
    """
    rank, left = folds.RANKS[name], folds.left(name, side)

    @jax.jit
    def own_choice(t, gradient):
        root = jnp.array([0, seed], jnp.uint32)
        (key,) = leaf_keys(root, NAME, [name], t)
        axis = -2 if left else -1
        chosen = projection.choose(key, gradient, rank, axis)
        return projection.from_stored(chosen, axis)

    if isinstance(projection, fj.TopDCT):
        choose = cosines(projection.norm)
    else:
        choose = singular_vectors

    def basis(t, gradient):
        if t and (every is None or (t + offset) % every):
            return None
        if isinstance(projection, fj.ObliviousProjection):
            epoch = (t + offset) // every if every else 0
            width = folds.width(name, side)
            return regenerated(projection, seed, name, rank, width)(epoch)
        if getattr(projection, "method", None) == "randomized":
            return np.asarray(own_choice(t, np.float32(gradient)), np.float64)
        return choose(gradient, rank, left)

    return basis


def stepped(tx, gradients, params=None):
    """Updates of all steps, each applied to the parameters, and the last state."""
    step = jax.jit(tx.update)
    state, outputs = tx.init(gradients[0] if params is None else params), []
    for gradient in gradients:
        updates, state = step(gradient, state, params)
        outputs.append(updates)
        if params is not None:
            params = {k: x + updates[k] for k, x in params.items()}
    return outputs, state
