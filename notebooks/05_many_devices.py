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
# # Many devices
#
# The optimizer state is sharded like its parameters. This notebook creates eight
# devices on one CPU and shows that training on them gives the same losses, what each
# device holds, and how to communicate less. On a machine with several GPUs or TPU
# cores, remove the first lines and the same program runs on them.

# %%
import os
import sys

# In a clone: pip install -e . there. In Colab: clone, and %cd to this folder.
if "google.colab" in sys.modules:
    import subprocess

    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", ".."])

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"  # Before jax is imported.
os.environ["NPROC"] = "32"  # With few cores XLA's threads can deadlock.

import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import flora_jax as fj

print(f"jax {jax.__version__} on {len(jax.devices())} x {jax.devices()[0].device_kind}")
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito
P, Auto = jax.P, jax.sharding.AxisType.Auto

# %% [markdown]
# ## A sharded model
#
# The mesh has four devices along `data` and two along `model`. Weights are sharded
# along both (fully sharded data parallelism and tensor parallelism), the batch along
# `data`.

# %%
mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(Auto, Auto))
specs = {"up": P("data", "model"), "down": P("model", "data"), "bias": P()}
layout = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / shape[0] ** 0.5


def create():
    return {
        "up": normal(0, 512, 2048),
        "down": normal(1, 2048, 512),
        "bias": jnp.zeros(512),
    }


x = normal(2, 64, 512) * 8
y = jnp.sin(x @ normal(3, 512, 512))


def loss(params, x, y):
    hidden = jax.nn.relu(x @ params["up"])
    return jnp.mean((hidden @ params["down"] + params["bias"] - y) ** 2)


tx = fj.flora(3e-2, fj.Sketch(rank=64))


def step(params, state, x, y):
    value, grads = jax.value_and_grad(loss)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value


# %% [markdown]
# ## The sharding of the state
#
# `fj.state_sharding` gives the sharding of every array of the state: a sketch keeps the
# parameter's mesh axes wherever they fit. `fj.memory_plan` then counts the bytes of one
# device. Nothing is allocated yet.

# %%
shapes = jax.eval_shape(create)
state_layout = fj.state_sharding(tx, shapes, layout)
print(fj.memory_plan(tx, shapes, shardings=layout))

# %% [markdown]
# ## Training, on eight devices and on one
#
# `jax.set_mesh` makes the mesh known to the projections: a sharded side is sketched as
# a sum over devices, and nothing of a gradient's size is gathered.

# %%
with jax.set_mesh(mesh):
    params = jax.jit(create, out_shardings=layout)()
    state = jax.jit(tx.init, out_shardings=state_layout)(params)
    train = jax.jit(step, out_shardings=(layout, state_layout, None))
    batch = jax.device_put((x, y), jax.NamedSharding(mesh, P("data")))
    sharded = []
    for _ in range(40):
        params, state, value = train(params, state, *batch)
        sharded.append(float(value))

alone, own = create(), tx.init(create())
train_alone, single = jax.jit(step), []
for _ in range(40):
    alone, own, value = train_alone(alone, own, x, y)
    single.append(float(value))

figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
axes.plot(single, color=BLUE, linewidth=4, alpha=0.6, label="one device")
axes.plot(sharded, "--", color=ORANGE, label="eight devices")
axes.set_xlabel("update")
axes.set_ylabel("training loss")
axes.legend(frameon=False)
axes.grid(alpha=0.3)
difference = np.abs(np.subtract(single, sharded)).max()
print(f"largest difference of the losses: {difference:.1e}")
assert difference < 1e-3

# %% [markdown]
# What each device holds, measured on the arrays themselves. AdamW's state would be
# twice the parameters.


# %%
def bytes_on(device, tree):
    shards = (s for leaf in jax.tree.leaves(tree) for s in leaf.addressable_shards)
    return sum(s.data.nbytes for s in shards if s.device == device)


figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
parts = {"parameters": (params, BLUE, None), "FLORA's state": (state, ORANGE, "//")}
base = np.zeros(8)
for name, (tree, color, hatch) in parts.items():
    sizes = np.array([bytes_on(device, tree) / 2**20 for device in jax.devices()])
    axes.bar(
        range(8), sizes, bottom=base, color=color, hatch=hatch, label=name, alpha=0.85
    )
    base += sizes
axes.set_xlabel("device")
axes.set_ylabel("MiB")
axes.set_ylim(0, 1.45 * base.max())
axes.legend(frameon=False, ncols=2)
axes.grid(alpha=0.3, axis="y")
plan = fj.memory_plan(tx, shapes, shardings=layout)
assert bytes_on(jax.devices()[0], state) == plan.state_bytes

momentum = optax.tree.get(state, "momentum")["up"]
print(f"the sketched momentum of `up`, {momentum.shape}:")
for shard in momentum.addressable_shards:
    sides = zip(momentum.shape, shard.index, strict=True)
    rows, columns = (range(side)[part] for side, part in sides)
    print(
        f"device {shard.device.id}: rows {rows[0]:2} to {rows[-1]:2},"
        f" columns {columns[0]:4} to {columns[-1]:4}"
    )

# %% [markdown]
# ## Sending less
#
# Where parameters are replicated, gradients are averaged over the devices. The mean of
# sketches is the sketch of the mean, so `fj.compressed_pmean` averages those. Below,
# the bytes that the compiled program all-reduces.

# %%
devices = jax.make_mesh((8,), ("data",), axis_types=(Auto,))


def averaged(mean):
    def local(params, x, y):
        # Or the gradient would be summed over the devices before it is sketched.
        own = jax.lax.pcast(params, "data", to="varying")
        return mean(jax.grad(loss)(own, x, y))

    specs_in = (P(), P("data"), P("data"))
    return jax.jit(jax.shard_map(local, mesh=devices, in_specs=specs_in, out_specs=P()))


def reduced_bytes(function):
    text = function.lower(create(), x, y).compile().as_text()
    found = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    shapes = [shape for line in found for shape in re.findall(r"f32\[([\d,]*)\]", line)]
    return 4 * sum(np.prod([int(n) for n in s.split(",") if n]) for s in shapes)


means = {"gradients": lambda g: jax.lax.pmean(g, "data")}
for rank in (256, 64, 16):
    means[f"sketches, rank {rank}"] = lambda g, rank=rank: fj.compressed_pmean(
        g, "data", fj.Sketch(rank), step=0
    )
sent = {name: reduced_bytes(averaged(mean)) / 2**20 for name, mean in means.items()}
figure, axes = plt.subplots(figsize=(6.5, 2.4), layout="constrained")
colors = [BLUE, *[ORANGE] * 3]
bars = axes.barh(list(sent), list(sent.values()), color=colors)
axes.bar_label(bars, fmt="%.2f", padding=3)
axes.invert_yaxis()
axes.set_xlim(0, 1.15 * max(sent.values()))
axes.set_xlabel("MiB all-reduced per step")
axes.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# The result is an estimate of the mean gradient, with the noise that `02_projections`
# shows. `docs/distributed.md` covers clusters, several processes, and checkpoints that
# are restored on another number of devices.
