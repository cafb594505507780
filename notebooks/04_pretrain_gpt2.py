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
# # Pretraining GPT-2: what fits, and which rank
#
# Two questions before training: does it fit, and what does a rank cost? The planner
# answers the first from shapes alone; short runs of a small GPT-2 answer the second.
# The text is Python's standard library, so nothing is downloaded.

# %%
import importlib.util
import sys

# In a clone: pip install -e '.[experiments]'. In Colab: clone, %cd to this folder.
if "google.colab" in sys.modules:
    import subprocess

    package = "..[experiments]"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package])
if importlib.util.find_spec("experiments") is None:
    # The models and the data are next to the notebooks' folder.
    sys.path.insert(0, "..")
if importlib.util.find_spec("experiments") is None:
    raise ImportError("run this notebook in a clone of the repository")

import asyncio
import logging
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import flora_jax as fj
from experiments.data import batches, packing
from experiments.models import build
from experiments.models.config import GPT2Config

logging.getLogger("absl").setLevel(logging.ERROR)
device = jax.devices()[0]
print(f"jax {jax.__version__} on {device.platform}: {device.device_kind}")
BLUE, ORANGE, GREEN, BLACK = "#0072B2", "#D55E00", "#009E73", "#000000"
GIB = 2**30

# %% [markdown]
# ## Will it fit?
#
# GPT-2 XL, 1.5 billion parameters, as shapes: nothing is allocated. A mask leaves the
# embeddings dense, as is best; the 48 layers are stacked.

# %%
xl = GPT2Config(48, width=1600, heads=25, context=1024, vocab_size=50257, scan=True)
_, shapes = jax.eval_shape(lambda: build.create(xl, 0))


def sketch(rank):
    return fj.Sketch(rank, mask=fj.not_embeddings)


print(fj.memory_plan(fj.flora(1e-3, sketch(256)), shapes, sketch=sketch(256)))

# %% [markdown]
# The same question the other way round: on a device of 24 GiB, parameters, gradients
# and activations take their share, and the optimizer gets what is left.
# `rank_for_budget` finds the largest rank whose state fits; for a checkpoint file there
# is `python -m flora_jax plan --shapes model.safetensors --budget 24GiB`.

# %%
parameters = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
recipes = {
    "flora": lambda rank: fj.flora(1e-3, sketch(rank)),
    "flora_adamw": lambda rank: fj.flora_adamw(1e-3, sketch(rank)),
    "galore": lambda rank: fj.galore(1e-3, sketch(rank)),
}
left = 24 * GIB - 2 * parameters
print(f"24 GiB less parameters and gradients: {left / GIB:.1f} GiB")
ranks = [16, 64, 256, 512, 1024]
figure, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
styles = zip(recipes.items(), (BLUE, ORANGE, GREEN), "os^", strict=True)
for (name, make), color, mark in styles:
    sizes = [fj.memory_plan(make(r), shapes, compare={}).state_bytes for r in ranks]
    axes.plot(ranks, np.array(sizes) / GIB, f"{mark}-", color=color, label=name)
    for budget in (1, 2, 4):
        rank = fj.rank_for_budget(make, shapes, budget * GIB)
        print(f"{name:12} {budget} GiB of state: rank {rank}")
adamw = fj.memory_plan(optax.adamw(1e-3), shapes, compare={}).state_bytes
axes.axhline(adamw / GIB, color=BLACK, linestyle="--", label="optax.adamw")
axes.axhline(parameters / GIB, color=BLACK, linestyle=":", label="the parameters")
axes.set_xscale("log", base=2)
axes.set_xticks(ranks, [str(r) for r in ranks])
axes.set_xlabel("rank (width 1600)")
axes.set_ylabel("optimizer state (GiB)")
axes.set_ylim(0, 1.35 * adamw / GIB)
axes.legend(frameon=False, fontsize=9, ncols=2, loc="upper left")
axes.grid(alpha=0.3)

# %% [markdown]
# ## What does a rank cost?
#
# A small GPT-2 at several ranks, compared with Adafactor with a full momentum: same
# data in the same order, same seed, and each at the best of three learning rates. The
# runs are short, so that they finish anywhere; `docs/benchmarks` has longer ones, with
# several seeds.

# %%
UPDATES, BATCH = 60, 8
model = GPT2Config(layers=2, width=128, heads=4, context=64, vocab_size=512)
dataset = packing.load(
    pathlib.Path(asyncio.__file__).parent,  # A part of the library is enough.
    pathlib.Path(tempfile.mkdtemp()),
    vocab_size=model.vocab_size,
    context=model.context,
)
order = batches.batched(dataset.train, BATCH, seed=0)
tokens = np.stack([order[i]["tokens"] for i in range(UPDATES)])
graphdef, start = build.create(model, 0)
print(f"{len(dataset.train)} examples of {model.context} tokens")


def train(make):
    """Losses of all updates, by learning rate."""

    @jax.jit
    def run(rate):
        tx = make(rate)

        def step(carry, batch):
            params, state = carry
            value, grads = jax.value_and_grad(
                lambda p: build.mean_loss(graphdef, p, {"tokens": batch})
            )(params)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), value

        return jax.lax.scan(step, (start, tx.init(start)), tokens)[1]

    return {rate: np.asarray(run(rate)) for rate in (0.03, 0.1, 0.3)}


optimizers = {"full momentum": lambda rate: optax.adafactor(rate, momentum=0.9)}
for rank in (8, 32, 96):
    optimizers[f"flora, rank {rank}"] = lambda rate, rank=rank: fj.flora(
        rate, sketch(rank), resample_every=None
    )
curves, sizes = {}, {}
for name, make in optimizers.items():
    runs = train(make)
    rate = min(runs, key=lambda rate: runs[rate][-10:].mean())
    curves[name] = runs[rate]
    sizes[name] = fj.memory_plan(make(rate), start, compare={}).state_bytes / 2**20
    print(
        f"{name:15} {sizes[name]:5.2f} MiB, learning rate {rate}:"
        f" loss {curves[name][-10:].mean():.3f} (last 10 updates)"
    )

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
colors, marks = (BLACK, GREEN, BLUE, ORANGE), "Do^s"
for (name, losses), color, mark in zip(curves.items(), colors, marks, strict=True):
    smooth = np.convolve(losses, np.ones(5) / 5, "valid")
    left.plot(smooth, color=color, marker=mark, markevery=12, markersize=5, label=name)
    right.plot(sizes[name], losses[-10:].mean(), mark, color=color, markersize=8)
    right.annotate(
        name,
        (sizes[name], losses[-10:].mean()),
        xytext=(0, 9),
        textcoords="offset points",
        ha="right" if name == "full momentum" else "left",
        fontsize=8,
    )
left.set_xlabel("update")
left.set_ylabel("training loss (mean of 5 updates)")
left.legend(frameon=False, fontsize=9)
right.set_xlabel("optimizer state (MiB)")
right.set_ylabel("loss of the last 10 updates")
right.margins(0.15)
for axes in (left, right):
    axes.grid(alpha=0.3)

# %% [markdown]
# Higher ranks reach a lower final loss. That some end below the full
# momentum does not make a sketch better than what it sketches: Adafactor's own momentum
# is a different chain (it averages after the learning rate and the parameter scale),
# and this is a short run with one seed. In the longer run of
# `docs/benchmarks/main_job.md` the full momentum is ahead.
#
# What holds beyond this small case: take the largest rank that fits (an eighth of the
# width costs FLORA's momentum some quality), leave embeddings dense, and tune the
# learning rate again. For AdamW's quality at a fraction of its state use
# `fj.flora_adamw`.
