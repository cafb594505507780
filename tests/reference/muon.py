"""The last step of Muon (Jordan et al., 2024; Liu et al., 2025) in float64."""

import numpy as np

# Of "The Polar Express" (Amsel et al., 2025), for values from 1e-3 to 1.
STEPS = [
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
]


def coefficients(steps):
    """Of each step, for values that are divided by 1.005 before it."""
    for step in (STEPS + steps * [(15 / 8, -10 / 8, 3 / 8)])[:steps]:
        yield [x / 1.005**power for x, power in zip(step, (1, 3, 5), strict=True)]


def newton_schulz(matrix, steps=5):
    """P Qᵀ of P Σ Qᵀ, roughly: the polynomial below of the singular values."""
    x = np.asarray(matrix, np.float64)
    x = x / (np.linalg.norm(x) or 1.0)
    for a, b, c in coefficients(steps):
        x = a * x + b * (x @ x.T @ x) + c * (x @ x.T @ x @ x.T @ x)
    return x


def polynomial(values, steps=5):
    """What becomes of singular values that are given in parts of the norm."""
    for a, b, c in coefficients(steps):
        values = a * values + b * values**3 + c * values**5
    return values


def orthogonalized(matrix, rms=0.2, steps=5):
    """With a root mean square of ``rms``."""
    factor = newton_schulz(matrix, steps)
    return rms * factor / (np.sqrt(np.mean(factor**2)) or 1.0)
