"""What a training changed of the weights, by their singular values and vectors."""

from typing import Any

import numpy as np
from flax import traverse_util

import flora_jax as fj

# As in Shuttleworth et al., 2024, arXiv 2410.21228.
_INTRUDER = 0.5  # Largest cosine to any singular vector of before.
_LEADING = 10  # Singular vectors that are looked at.


def changes(before: Any, after: Any) -> dict[str, dict[str, Any]]:
    """Takes the change of every matrix apart, see `decompose`; by path.

    Args:
        before: parameters, of which kernels that are no embeddings are looked at; those
            of stacked layers one by one.
        after: the same after training.
    """
    old, new = map(_matrices, (before, after))
    return {path: decompose(matrix, new[path]) for path, matrix in old.items()}


def _matrices(params: Any) -> dict[str, np.ndarray]:
    found = {}
    for names, leaf in traverse_util.flatten_dict(params).items():
        path = "/".join(map(str, names))
        if path.endswith("kernel") and fj.not_embeddings(path, leaf.shape):
            layers = np.asarray(leaf).reshape(-1, *leaf.shape[-2:])
            stacked = leaf.ndim > 2
            found |= {path + f"/{i}" * stacked: x for i, x in enumerate(layers)}
    return found


def decompose(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Takes the change of a weight apart.

    Args:
        before: the weight, (n, m).
        after: the weight after training.

    Returns:
        "singular_values" of the change, descending; "effective_rank", the exponential
        of the entropy of its normalized singular values (Roy and Vetterli, 2007);
        "intruders", how many of the ten leading left singular vectors after training
        have no cosine of 0.5 or more with any left singular vector of before;
        "relative_change", the quotient of the Frobenius norms.
    """
    values = np.linalg.svd(after - before, compute_uv=False)
    share = values[values > 0] / max(values.sum(), np.finfo(values.dtype).tiny)
    old, new = (np.linalg.svd(x, full_matrices=False)[0] for x in (before, after))
    closest = np.abs(old.T @ new[:, :_LEADING]).max(axis=0)
    change = np.linalg.norm(after - before) / np.linalg.norm(before)
    return {
        "singular_values": values.tolist(),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "intruders": int((closest < _INTRUDER).sum()),
        "relative_change": float(change),
    }
