"""Adam on selected rows of the cosine transform (arXiv 2505.17967), in float64."""

import numpy as np

from tests.reference.subspace import adam, begins, per_matrix, step


def dct_matrix(width):
    """Q: the orthonormal DCT-II, a basis vector per row."""
    i, j = np.arange(width)[:, None], np.arange(width)[None, :]
    q = np.sqrt(2 / width) * np.cos(i * (2 * j + 1) * np.pi / (2 * width))
    q[0] *= np.sqrt(1 / 2)
    return q


def dct_by_fft(x):
    """Q X by Makhoul's algorithm (IEEE Trans. ASSP 28, 1980): one Fourier transform."""
    width = len(x)
    permuted = np.concatenate([x[0::2], x[1::2][::-1]])
    k = np.arange(width)
    turn = 2 * np.exp(-1j * np.pi * k / (2 * width))
    length = np.where(k == 0, np.sqrt(4 * width), np.sqrt(2 * width))
    return ((turn / length)[:, None] * np.fft.fft(permuted, axis=0)).real


def top_rows(g, rank, norm="l1"):
    """Indices of the rows of Q G with the largest norms, ascending; ties: the first."""
    transformed = dct_matrix(len(g)) @ g
    power = {"l1": np.abs, "l2": np.square}[norm]
    norms = power(transformed).sum(axis=1)
    return np.sort(np.argsort(-norms, kind="stable")[:rank])


def dct_adamw(
    weights,
    gradients,
    learning_rate,
    rank,
    refresh_every=1,
    b1=0.9,
    b2=0.999,
    eps=1e-8,
    weight_decay=0.0,
    left=False,
    norm="l1",
    error_feedback=False,
):
    """Updates of all steps; each is added to the weights before the next.

    weights, gradients, learning_rate, left: as of ``subspace_adam``. norm: "l1" or
    "l2". error_feedback: add what the basis lost to the next gradient.
    """

    def one_matrix(w, matrices):
        x, error, updates = np.asarray(w, np.float64), 0.0, []
        for t, gradient in enumerate(matrices):
            g = np.asarray(gradient, np.float64)
            a = (g if left else g.T) + error
            if t == 0:
                indices = top_rows(a, rank, norm)
                m = v = np.zeros((rank, a.shape[1]))
            elif begins(t, refresh_every):
                old, indices = indices, top_rows(a, rank, norm)
                m, v = moved(m, old, indices), moved(v, old, indices)
            s = dct_matrix(len(a))[indices]
            r = s @ a
            m, v, n = adam(m, v, r, b1, b2, eps, t + 1)
            d = s.T @ n
            updates.append(step(d if left else d.T, x, learning_rate(t), weight_decay))
            x = x + updates[-1]
            error = a - s.T @ r if error_feedback else 0.0
        return updates

    return per_matrix(one_matrix, weights, gradients)


def moved(moment, old, new):
    """Rows of the indices that stay, at their new places; zeros for the others."""
    rows = dict(zip(old, moment, strict=True))
    return np.stack([rows.get(i, np.zeros(moment.shape[1])) for i in new])
