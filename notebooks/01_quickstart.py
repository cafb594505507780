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
# # Quickstart
#
# An optimizer keeps state next to the parameters: a momentum, an accumulator of
# gradients. Each is as large as the model. `flora_jax` keeps *sketches* of them: random
# projections to a few rows, where the projection is regenerated from a key in the state
# whenever it is needed. In a script that uses optax, one line changes.

# %%
import sys

# In a clone: pip install -e . there. In Colab: clone, and %cd to this folder.
if "google.colab" in sys.modules:
    import subprocess

    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", ".."])

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import flora_jax as fj

device = jax.devices()[0]
print(f"jax {jax.__version__} on {device.platform}: {device.device_kind}")

# %% [markdown]
# ## A small problem
#
# A network with two hidden layers of width 512 learns from a random teacher. None of
# this code depends on `flora_jax`.

# %%
WIDTH, UPDATES = 512, 160


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


params = {
    "first": {"kernel": normal(1, 256, WIDTH), "bias": jnp.zeros(WIDTH)},
    "second": {"kernel": normal(2, WIDTH, WIDTH), "bias": jnp.zeros(WIDTH)},
    "last": {"kernel": normal(3, WIDTH, 128), "bias": jnp.zeros(128)},
}
teacher = normal(4, 256, 64), normal(5, 64, 128)


def network(params, x):
    for name in ("first", "second"):
        x = jax.nn.gelu(x @ params[name]["kernel"] + params[name]["bias"])
    return x @ params["last"]["kernel"] + params["last"]["bias"]


def loss(params, batch):
    x, y = batch
    return jnp.mean((network(params, x) - y) ** 2)


def batch_of(step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(6), step), (128, 256))
    return x, jnp.sin(2 * x @ teacher[0]) @ teacher[1]


# %% [markdown]
# ## The line that changes
#
# Two pairs: Adafactor with momentum, and gradient accumulation over four
# micro-batches. In each, the second line replaces the first.

# %%
sketch = fj.Sketch(rank=64)

optimizers = {
    "adafactor, momentum": lambda rate: optax.adafactor(rate, momentum=0.9),
    "flora": lambda rate: fj.flora(rate, sketch),
    "MultiSteps(adafactor)": lambda rate: optax.MultiSteps(optax.adafactor(rate), 4),
    "compressed_accumulation": lambda rate: fj.compressed_accumulation(
        optax.adafactor(rate), 4, sketch
    ),
}

# %% [markdown]
# ## Memory, before anything is allocated
#
# `fj.memory_plan` reports the size of the state leaf by leaf: how each matrix is
# sketched, and why a leaf stays dense. Biases do, and so would narrow matrices, where
# there is nothing to gain.

# %%
print(fj.memory_plan(optimizers["flora"](0.1), params, sketch=sketch))


# %%
def state_bytes(make):
    return sum(x.nbytes for x in jax.tree.leaves(make(0.1).init(params)))


sizes = {name: state_bytes(make) for name, make in optimizers.items()}
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito
colors = [BLUE, ORANGE, BLUE, ORANGE]
figure, axes = plt.subplots(figsize=(6.5, 2.4), layout="constrained")
bars = axes.barh(list(sizes), [x / 2**20 for x in sizes.values()], color=colors)
axes.bar_label(bars, fmt="%.2f", padding=3)
axes.set_xlabel("optimizer state after init (MiB)")
axes.set_xlim(0, 1.15 * max(sizes.values()) / 2**20)
axes.invert_yaxis()
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## Training
#
# Each optimizer is run at the same learning rates and shown at its best one, since
# learning rates do not carry over from one to the other. The batches are the same.

# %%
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)


def train(make):
    """The losses of all steps, by learning rate."""

    @jax.jit
    def run(rate):
        tx = make(rate)

        def step(carry, i):
            params, state = carry
            value, grads = jax.value_and_grad(loss)(params, batch_of(i))
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        start = params, tx.init(params)
        return jax.lax.scan(step, start, jnp.arange(UPDATES))[1]

    return {rate: np.asarray(run(rate)) for rate in RATES}


best = {}
for name, make in optimizers.items():
    runs = train(make)
    rate = min(runs, key=lambda rate: runs[rate][-20:].mean())
    best[name] = runs[rate]
    end = runs[rate][-20:].mean()
    print(f"{name:24} learning rate {rate:4}: {end:.3f} (last 20 steps)")

# %%
figure, panels = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained", sharey=True)
panels[0].set_ylabel("training loss (mean of 8 steps)")
names = list(best)
titles = ("momentum", "accumulation of 4 micro-batches")
for axes, pair, title in zip(panels, (names[:2], names[2:]), titles, strict=True):
    for name, color, style in zip(pair, (BLUE, ORANGE), ("-", "--"), strict=True):
        smooth = np.convolve(best[name], np.ones(8) / 8, "valid")
        label = f"{name}, {sizes[name] / 2**20:.2f} MiB"
        axes.plot(smooth, style, color=color, label=label)
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=9)

# %% [markdown]
# The sketched state is a fraction of the full one. Its price is the noise of the
# sketch: the curve lies above, most of all at the start of the accumulation, whose
# learning rate is higher here. The noise falls as the rank grows: set it to 96 and run
# again. `02_projections` shows how a sketch works and what its noise is;
# `04_pretrain_gpt2` shows which rank fits in memory.
