"""The last step of Muon (Jordan et al., 2024; Liu et al., 2025) in float64."""

import numpy as np

A, B, C = 3.4445, -4.7750, 2.0315


def newton_schulz(matrix, steps=5):
    """P Qᵀ of P Σ Qᵀ, roughly: the polynomial below of the singular values."""
    x = np.asarray(matrix, np.float64)
    x = x / (np.linalg.norm(x) or 1.0)
    for _ in range(steps):
        x = A * x + B * (x @ x.T @ x) + C * (x @ x.T @ x @ x.T @ x)
    return x


def polynomial(values, steps=5):
    """What becomes of singular values that are given in parts of the norm."""
    for _ in range(steps):
        values = A * values + B * values**3 + C * values**5
    return values


def orthogonalized(matrix, rms=0.2, steps=5):
    """With the size that gives a matrix of n x m a root mean square of about ``rms``.

    That of P Qᵀ is 1 / √max(n, m).
    """
    return rms * np.sqrt(max(np.shape(matrix))) * newton_schulz(matrix, steps)
