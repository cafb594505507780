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
# # Gradients sketched during backpropagation
#
# FLORA keeps a sketch of the accumulated gradient in place of the gradient. But a
# training step first computes each gradient in full, writes it to memory, and reads it
# back to sketch it. That is not necessary: automatic differentiation can compute the
# sketch itself.

# %%
import sys

# In a clone: pip install -e . there. In Colab: clone, and %cd to this folder.
if "google.colab" in sys.modules:
    import subprocess

    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", ".."])

import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import flora_jax as fj

print(f"jax {jax.__version__} on {jax.devices()[0].device_kind}")

# %% [markdown]
# ## The derivation, in three lines
#
# Let $y = xW$ with $T$ tokens in the rows of $x$, cotangent $\delta = \partial
# L/\partial y$, and a random $S$ ($r \times m$). Then
#
# $$\begin{aligned}
# \partial L/\partial W &= x^\top \delta && \text{: } 2\,T m n \text{ operations}\\
# S\,\partial L/\partial W &= S\,(x^\top \delta)\\
# &= (x S^\top)^\top \delta && \text{: } 2\,T r n\text{, and } T m
# \text{ for } x S^\top \text{ with CountSketch.}
# \end{aligned}$$
#
# The second form is what LoRA's $B$ receives as its gradient for $y = xW + (xS^\top)B$
# at $B = 0$: a low-rank adapter at zero *is* a compressor of the gradient. Of the three
# products of a layer (forward, $\delta W^\top$, $x^\top\delta$) it makes the third
# $m/r$ times smaller. Numerically:

# %%
tokens, rows, columns, rank = 480, 256, 512, 16
keys = jax.random.split(jax.random.key(0), 4)
x = jax.random.normal(keys[0], (tokens, rows))
w = jax.random.normal(keys[1], (rows, columns)) / rows**0.5
s = jax.random.normal(keys[2], (rank, rows)) / rank**0.5
target = jax.random.normal(keys[3], (tokens, columns))


def loss_of(y):
    return jnp.mean((jnp.tanh(y) - target) ** 2)


full = jax.grad(lambda w: loss_of(x @ w))(w)
adapter = jax.grad(lambda b: loss_of(x @ w + (x @ s.T) @ b))(jnp.zeros((rank, columns)))
error = jnp.linalg.norm(adapter - s @ full) / jnp.linalg.norm(s @ full)
print(f"gradient {full.shape}, sketch {adapter.shape}, relative error {error:.1e}")

# %% [markdown]
# ## Without changing the model
#
# `fj.sketched_value_and_grad` replaces `jax.value_and_grad`. It traces the loss and
# moves $S$ from each weight's gradient back through casts, transposes, sums, scans and
# rematerialization to the product where the gradient begins. The model has no adapters
# and is not changed. Here is a residual network whose layers are scanned:


# %%
def model(params, x):
    def layer(h, p):
        return h + jax.nn.gelu(h @ p["up"]) @ p["down"], None

    h, _ = jax.lax.scan(jax.checkpoint(layer), x @ params["in"], params["layers"])
    return h @ params["out"] + params["bias"]


def loss(params, batch):
    x, y = batch
    return jnp.mean((model(params, x) - y) ** 2)


def normal(key, *shape):
    return jax.random.normal(jax.random.key(key), shape) / shape[-2] ** 0.5


params = {
    "in": normal(1, 128, 256),
    "layers": {"up": normal(2, 3, 256, 512), "down": normal(3, 3, 512, 256) / 3},
    "out": normal(4, 256, 128),
    "bias": jnp.zeros(128),
}
teacher = jax.random.normal(jax.random.key(5), (128, 128)) / 128**0.5


def batch_of(step, size=480):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(6), step), (size, 128))
    return x, jnp.sin(2 * x @ teacher)


sketch = fj.Sketch(rank=32, key=7)  # The same object for both, so that S is the same.
tx = fj.compressed_accumulation(optax.adam(1e-3), 4, sketch)
state = tx.init(params)


def sketched_gradient(params, state, batch):
    # The key and the cycle come from the state of the accumulation.
    return fj.sketched_value_and_grad(loss, sketch)(state, params, batch)


value, grads = jax.jit(sketched_gradient)(params, state, batch_of(0))
for (path, leaf), (_, weight) in zip(
    jax.tree_util.tree_leaves_with_path(grads.tree),
    jax.tree_util.tree_leaves_with_path(params),
    strict=True,
):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    print(f"{name:12} {weight.shape!s:16} -> {leaf.shape}")

# %% [markdown]
# Where something else stands between a weight and its products, the gradient is
# computed in full and then sketched, so the result is correct in any case.
# `fj.explain_sketched_gradients` lists what happens to each leaf. A weight that is
# squared before its use is such a case:

# %%
for name, fun in {
    "as it is": loss,
    "squared": lambda p, batch: loss(p | {"out": p["out"] ** 2}, batch),
}.items():
    print(name)
    for leaf in fj.explain_sketched_gradients(fun, sketch)(params, batch_of(0)):
        print(f"  {leaf}")

# %% [markdown]
# ## The same result
#
# The accumulator takes sketches in place of gradients; its state has the same structure
# and, up to rounding, the same values. Both runs below end at the same loss.


# %%
def full_gradient(params, state, batch):
    return jax.value_and_grad(loss)(params, batch)


@functools.partial(jax.jit, static_argnums=0)
def train_step(gradient, params, state, batch):
    value, grads = gradient(params, state, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


curves = {}
for name, gradient in {"full": full_gradient, "sketched": sketched_gradient}.items():
    now, state, values = params, tx.init(params), []
    for step in range(160):
        now, state, value = train_step(gradient, now, state, batch_of(step))
        values.append(float(value))
    curves[name] = np.asarray(values)

BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"  # Okabe and Ito
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.plot(curves["full"], color=BLUE, linewidth=3, label="full gradients")
axes.plot(curves["sketched"], "--", color=ORANGE, label="sketched gradients")
axes.set_xlabel("micro-step (4 to an update)")
axes.set_ylabel("training loss")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
difference = np.abs(curves["full"] - curves["sketched"]).max()
print(f"largest difference of the losses: {difference:.1e}")
assert difference < 0.02  # Much smaller on a CPU; GPUs round products to TF32.

# %% [markdown]
# ## What it saves
#
# FLOPs of the gradient function as XLA counts them, relative to full gradients (layers
# unrolled, since a loop's body is counted once). A third of them compute the weights'
# gradients, so two thirds is the lower bound; a Gaussian $S$ costs a product of its
# own.


# %%
def unrolled(params, batch):
    x, y = batch
    h = x @ params["in"]
    for up, down in zip(params["layers"]["up"], params["layers"]["down"], strict=True):
        h = h + jax.nn.gelu(h @ up) @ down
    return jnp.mean((h @ params["out"] + params["bias"] - y) ** 2)


def unstacked(params):
    layers = {name: list(leaf) for name, leaf in params["layers"].items()}
    return params | {"layers": layers}


def flops(gradient):
    arguments = unstacked(params), batch_of(0)
    return jax.jit(gradient).lower(*arguments).compile().cost_analysis()["flops"]


whole = flops(jax.value_and_grad(unrolled))


def share(rank, projection):
    sketch = fj.Sketch(rank, projection)
    gradient = fj.sketched_value_and_grad(unrolled, sketch)
    return flops(lambda p, batch: gradient(sketch.cycle(0), p, batch)[1].tree) / whole


ranks = [8, 16, 32, 64, 96]
figure, axes = plt.subplots(figsize=(6, 3.4), layout="constrained")
axes.axhline(1, color="black", linewidth=1, label="full gradients")
for projection, style, color in (
    (fj.CountSketch(), "o-", ORANGE),
    (fj.Gaussian(), "s--", GREEN),
):
    shares = [share(rank, projection) for rank in ranks]
    name = type(projection).__name__
    axes.plot(ranks, shares, style, color=color, label=f"sketched, {name}")
axes.axhline(2 / 3, color="grey", linestyle=":", label="no weight gradients")
axes.set_xlabel("rank of the sketch (widths are 128 and 256)")
axes.set_ylabel("FLOPs relative to full gradients")
axes.set_ylim(0.6, 1.05)
axes.legend(frameon=False, fontsize=8)
axes.grid(alpha=0.3)

# %% [markdown]
# ## Activations
#
# Of $y = xW$ the backward pass needs $x$ for the gradient of $W$ alone. If that is
# sketched along $W$'s inputs (`side="left"`), it needs only $x S^\top$, and
# `sketched_value_and_grad` frees $x$ in the forward pass: a scan over layers stacks
# sketches in place of activations. Here nothing is recomputed but the activation
# function, whose input stays. `explain_sketched_gradients` says of each leaf whether
# its activations are kept whole, and why.
#
# On a v5e (15.75 GiB) a whole training step on all parameters of T5-3B in float32,
# for one example, its layers recomputed, takes 11.7 GiB at rank 16 and 12.5 at rank
# 64 by the TPU's compiler; one on LoRA's adapters takes 11.4 and 13.4, with full
# accumulation it needs 28. The [documentation](../docs/benchmarks/memory.md) has the
# conditions and a picture of what fills the memory.


# %%
def layers(params, x):
    def layer(h, p):
        inner = jax.checkpoint(jax.nn.gelu)(jax.nn.standardize(h) @ p["up"])
        return h + inner @ p["down"], None

    return jax.lax.scan(layer, x, params)[0]


def of_layers(params, x):
    return jnp.mean(layers(params, x) ** 2)


def temporaries(gradient):
    lowered = jax.jit(gradient).lower(params["layers"], inputs)
    return lowered.compile().memory_analysis().temp_size_in_bytes / 2**20


inputs = jax.random.normal(jax.random.key(8), (4096, 256))
found = {"full gradients": temporaries(jax.value_and_grad(of_layers))}
for side in ("smaller", "left"):
    own = fj.Sketch(1 / 8, side=side)
    gradient = fj.sketched_value_and_grad(of_layers, own)
    found[f'side="{side}"'] = temporaries(
        lambda p, x, gradient=gradient, own=own: gradient(own.cycle(0), p, x)[1].tree
    )
    for leaf in fj.explain_sketched_gradients(of_layers, own)(params["layers"], inputs):
        kept = leaf.unsketched_activations
        print(f'side="{side}": {leaf.path}:', kept or "a sketch of its activations")
print({name: f"{size:.0f} MiB" for name, size in found.items()})

# %% [markdown]
# ## The norm of a gradient that is never formed
#
# `grads.global_norm()` estimates it: the square is unbiased, for $\mathbb{E}\,\|S G\|^2
# = \|G\|^2$. Use it as an estimate, for logging or clipping. Over 300 cycles, each with
# a projection of its own:

# %%
batch = batch_of(0)
exact = float(optax.tree.norm(jax.grad(loss)(params, batch)))


@jax.jit
def norms(cycles):
    def one(cycle):
        gradient = fj.sketched_value_and_grad(loss, sketch)
        return gradient(sketch.cycle(cycle), params, batch)[1].global_norm()

    return jax.lax.map(one, cycles)


found = np.asarray(norms(jnp.arange(300)))
figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
axes.hist(found, bins=24, color=BLUE, alpha=0.8, label="estimates, one per projection")
axes.axvline(exact, color=ORANGE, linestyle="--", label="norm of the full gradient")
axes.set_xlabel("global norm")
axes.set_ylabel("projections")
axes.legend(frameon=False)
mean_square = (found**2).mean()
print(f"norm {exact:.4f}; root of the estimates' mean square {mean_square**0.5:.4f}")
