# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What a projection does
#
# A gradient $G$ ($n \times m$) is kept as a sketch $C = G S^\top$ with a random $S$
# ($r \times m$, $r \ll m$), and estimated as $\tilde G = C S = G S^\top S$. This
# notebook shows in five steps what is lost and what is not.

# %%
import sys

# In a clone: pip install -e . there. In Colab: clone, and %cd to this folder.
if "google.colab" in sys.modules:
    import subprocess

    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", ".."])

import functools
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import flora_jax as fj

device = jax.devices()[0]
print(f"jax {jax.__version__} on {device.platform}: {device.device_kind}")

BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
N, M, RANK = 256, 512, 64
STYLES = {
    "Gaussian": (fj.Gaussian(normalization="unbiased"), BLUE, "o"),
    "CountSketch": (fj.CountSketch(normalization="unbiased"), ORANGE, "s"),
}
gradient = jax.random.normal(jax.random.key(0), (N, M)) * jnp.linspace(0.1, 2, M)


def estimate(projection, key, rank=RANK, g=gradient):
    sketch = projection.sketch(key, g, rank, -1)  # (n, r), all that is kept
    return projection.unsketch(key, sketch, g.shape[-1], -1)


def norm(x):
    return jnp.linalg.norm(x)


# %% [markdown]
# ## 1. Unbiased
#
# One estimate is far from the gradient, but its mean over keys is the gradient: the
# error of the mean of $k$ estimates falls as $1/\sqrt k$, starting from the error of
# one, which theory gives as $\sqrt{(m+1)/r}$ for a Gaussian and $\sqrt{m/r - 1}$ for
# CountSketch.

# %%
COUNTS = 4 ** np.arange(6)


@functools.partial(jax.jit, static_argnums=0)
def total(projection, keys):
    """The sum of the estimates of many keys."""

    def add(sums, key):
        return sums + estimate(projection, key), None

    return jax.lax.scan(add, jnp.zeros_like(gradient), keys)[0]


def errors_of_means(projection):
    keys = jax.random.split(jax.random.key(1), COUNTS[-1])
    sums, seen, errors = jnp.zeros_like(gradient), 0, []
    for count in COUNTS:
        sums, seen = sums + total(projection, keys[seen:count]), count
        errors.append(norm(sums / count - gradient) / norm(gradient))
    return np.asarray(errors)


theory = {"Gaussian": ((M + 1) / RANK) ** 0.5, "CountSketch": (M / RANK - 1) ** 0.5}
figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
for name, (projection, color, mark) in STYLES.items():
    axes.loglog(
        COUNTS, theory[name] / COUNTS**0.5, "-", color=color, label=f"{name}, theory"
    )
    axes.loglog(COUNTS, errors_of_means(projection), mark, color=color, label=name)
axes.set_xlabel("number of estimates averaged, each with its own key")
axes.set_ylabel("relative error of the mean")
axes.legend(frameon=False)
axes.grid(alpha=0.3, which="both")

# %% [markdown]
# ## 2. Variance against rank
#
# Doubling the rank halves the squared error, or better. At full rank CountSketch is
# exact and a Gaussian is not, because its rows are not orthogonal. The right panel
# shows the cosine between gradient and estimate, which is what matters to an optimizer
# that normalizes its updates.

# %%
RANKS = np.array([8, 16, 32, 64, 128, 256, 512])
figure, panels = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
for name, (projection, color, mark) in STYLES.items():
    squares, cosines = [], []
    for rank in RANKS:

        @jax.jit
        def both(key, projection=projection, rank=int(rank)):
            found = estimate(projection, key, rank)
            error = norm(found - gradient) / norm(gradient)
            return error**2, jnp.vdot(found, gradient) / norm(found) / norm(gradient)

        pairs = [both(key) for key in jax.random.split(jax.random.key(2), 6)]
        squares.append(np.mean([a for a, _ in pairs]))
        cosines.append(np.mean([b for _, b in pairs]))
    if name == "Gaussian":
        variance, cosine = (M + 1) / RANKS, 1 / np.sqrt(1 + (M + 1) / RANKS)
    else:
        variance, cosine = M / RANKS - 1, np.sqrt(RANKS / M)
    shown = variance > 0
    panels[0].loglog(RANKS[shown], variance[shown], color=color)
    kept = np.asarray(squares) > 1e-6  # Exact at full rank: not on a logarithmic axis.
    panels[0].loglog(RANKS[kept], np.asarray(squares)[kept], mark, color=color)
    panels[1].semilogx(RANKS, cosine, color=color, label=f"{name}, theory")
    panels[1].semilogx(RANKS, cosines, mark, color=color, label=name)
panels[0].set_ylabel("squared relative error")
panels[1].set_ylabel("cosine of estimate and gradient")
panels[1].legend(frameon=False, fontsize=9)
for axes in panels:
    axes.set_xlabel(f"rank r (width m = {M})")
    axes.set_xticks(RANKS, [str(r) for r in RANKS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)

# %% [markdown]
# ## 3. CountSketch versus Gaussian
#
# A Gaussian $S$ is dense, and sketching is a matrix product. CountSketch has one sign
# in each column, and sketching is a signed sum of the gradient's columns in $r$ groups.
# It needs no product and no $r \times m$ normal samples, and its error is slightly
# smaller because its rows are orthogonal.

# %%
figure, panels = plt.subplots(2, 1, figsize=(8, 2.9), layout="constrained")
panels[1].set_xlabel("column of the gradient")
for axes, (name, (projection, *_)) in zip(panels, STYLES.items(), strict=True):
    s = projection.matrix(jax.random.key(3), 8, 64)
    limit = float(jnp.abs(s).max())
    image = axes.imshow(s, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
    axes.set_title(f"{name}: S of 8 rows and 64 columns", fontsize=10)
    axes.set_ylabel("row")
    figure.colorbar(image, ax=axes, label="entry")

# %% [markdown]
# Consequently the time of a Gaussian grows with the rank, as its product and its
# samples do, while CountSketch reads the gradient once at any rank.

# %%
large = jax.random.normal(jax.random.key(4), (1024, 4096))


def milliseconds(function, *arguments):
    jax.block_until_ready(function(*arguments))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - start)
    return 1e3 * float(np.median(times))


ranks = [16, 64, 256]
key = jax.random.key(5)
figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
for i, (name, (projection, color, _)) in enumerate(STYLES.items()):
    times = [
        milliseconds(
            jax.jit(lambda g, k, p=projection, r=r: p.sketch(k, g, r, -2)), large, key
        )
        for r in ranks
    ]
    places = np.arange(len(ranks)) + 0.38 * (i - 0.5)
    hatch = "//" if i else None
    axes.bar(places, times, 0.36, color=color, hatch=hatch, label=name, alpha=0.85)
axes.set_xticks(range(len(ranks)), [str(r) for r in ranks])
axes.set_xlabel("rank")
axes.set_ylabel("ms, including sampling S")
axes.set_title(
    f"sketching the smaller side of 1024 x 4096 on {device.platform}, median of 5",
    fontsize=10,
)
axes.legend(frameon=False)
axes.grid(alpha=0.3, axis="y")

# %% [markdown]
# ## 4. Resampling and the rank of the update
#
# With a fixed $S$ all updates lie in the $r$ directions of its rows: that is LoRA. With
# a new $S$ at each step the directions add up. Here the gradients of 16 steps are
# estimated and summed; the singular values of the sum show how many directions it has.

# %%
STEPS, SMALL = 16, 16
steps = [
    jax.random.normal(jax.random.key(100 + i), (N, M)) + gradient for i in range(STEPS)
]
projection = fj.CountSketch(normalization="unbiased")


@jax.jit
def one(key, g):
    return estimate(projection, key, SMALL, g)


sums = {
    "one S for all steps": sum(one(jax.random.key(7), g) for g in steps),
    "a new S at each step": sum(
        one(jax.random.key(7 + i), g) for i, g in enumerate(steps)
    ),
    "no sketch": sum(steps),
}
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
lines = zip(sums.items(), (BLUE, ORANGE, BLACK), ("-", "--", ":"), strict=True)
for (name, total), color, style in lines:
    values = np.linalg.svd(np.asarray(total, np.float64), compute_uv=False)
    rank = int((values > 1e-4 * values[0]).sum())
    shown = np.maximum(values / values[0], 1e-4)
    axes.semilogy(shown, style, color=color, label=f"{name}: rank {rank}")
axes.set_ylim(2e-3, 1.3)
axes.set_xlabel(f"index of the singular value of the sum of {STEPS} updates")
axes.set_ylabel("relative to the largest")
axes.set_title(f"sketches of rank {SMALL}", fontsize=10)
axes.legend(frameon=False)
axes.grid(alpha=0.3)

# %% [markdown]
# ## 5. What resampling costs a momentum
#
# A momentum is transferred to the new projection: decompressed with the old $S$ and
# compressed with the new one. Each transfer multiplies its energy by $m/r$, and the
# decay compensates for that if there are enough steps before the next transfer: $\kappa
# > \ln(m/r) / (2 \ln(1/\beta))$. Below that limit the momentum diverges. The curves
# show the norm of a sketched momentum of one constant gradient, relative to that
# gradient's.

# %%
BETA, TOTAL, SHORT = 0.9, 120, 32
limit = np.log(M / SHORT) / (2 * np.log(1 / BETA))
figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
runs = zip((40, 20, 10), (GREEN, BLUE, ORANGE), ("-", "--", ":"), strict=True)
for every, color, style in runs:

    @jax.jit
    def advance(momentum, new, old, i, every=every):
        moved = projection.unsketch(old, momentum, M, -1)
        moved = projection.sketch(new, moved, SHORT, -1)
        momentum = jnp.where((i > 0) & (i % every == 0), moved, momentum)
        fresh = projection.sketch(new, gradient, SHORT, -1)
        return BETA * momentum + (1 - BETA) * fresh

    momentum, norms = jnp.zeros((N, SHORT)), []
    for i in range(TOTAL):
        new, old = (jax.random.key(i // every - back) for back in (0, 1))
        momentum = advance(momentum, new, old if i >= every else new, i)
        norms.append(norm(momentum) / norm(gradient))
    axes.semilogy(norms, style, color=color, label=f"resampled every {every} steps")
axes.axhline(1, color=BLACK, linewidth=0.8)
axes.set_xlabel("step")
axes.set_ylabel("norm relative to the gradient's")
axes.set_title(
    f"beta {BETA}, rank {SHORT} of {M}: limit {limit:.1f} steps", fontsize=10
)
axes.legend(frameon=False)
axes.grid(alpha=0.3)

# %% [markdown]
# `fj.flora` and `fj.compressed_momentum` warn in `init` when an interval comes near
# that limit, naming the leaf and the number. `fj.diagnostics` measures error, cosine
# and the momentum's norm during training.
