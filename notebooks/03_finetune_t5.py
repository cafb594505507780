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
# # Fine-tuning T5 with FLORA's accumulation
#
# The paper's first experiment: gradients of many micro-batches are accumulated before
# an update, and the accumulator is a sketch. Here with a T5 in Flax NNX, on generated
# pairs (German and English names, dates, numbers and units), so that the notebook runs
# offline. Two settings switch to XSum and to a checkpoint of your own.

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

import contextlib
import dataclasses
import json
import logging
import pathlib
import tempfile

import jax
import matplotlib.pyplot as plt
import optax
from IPython.utils.capture import capture_output

import flora_jax as fj
from experiments.finetune.config import PRESETS
from experiments.finetune.prepare import prepare
from experiments.finetune.run import run

logging.getLogger("absl").setLevel(logging.ERROR)
device = jax.devices()[0]
print(f"jax {jax.__version__} on {device.platform}: {device.device_kind}")
BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe and Ito

# %% [markdown]
# ## Settings
#
# `XSUM` uses the paper's settings for T5-small in place of the offline ones; its data
# has to be downloaded by hand, and a message says how. `CHECKPOINT` is a folder with a
# Hugging Face checkpoint (`config.json`, `model.safetensors`, the tokenizer) to start
# from; the offline model trains from scratch.

# %%
XSUM = False
CHECKPOINT = None  # For example pathlib.Path("t5-small")

folder = pathlib.Path(tempfile.mkdtemp())
settings = {
    "methods": ("full_accumulation", "flora_accumulation"),
    "ranks": (16,),
    "output_dir": folder / "runs",
    "data_dir": pathlib.Path("runs/data") if XSUM else folder / "data",
}
if XSUM:
    _, config = PRESETS["xsum-t5-small"]
else:
    _, config = PRESETS["phrases"]
    settings |= {
        "updates": 80,
        "batch_size": 16,
        "micro_batches": 4,
        "vocab_size": 512,
        "source_length": 24,
        "target_length": 16,
        "eval_every": 20,
        "eval_examples": 64,
        "decode_examples": 16,
        "checkpoint_every": 80,
        "scan": True,  # Stacked layers compile faster.
    }
if CHECKPOINT is not None:
    settings["checkpoint"] = CHECKPOINT
config = dataclasses.replace(config, **settings)
prepared = prepare(config)
print(prepared.dataset.description)
source, target = prepared.splits["train"][0][:2]
print(f"for example {source!r} -> {target!r}")

# %% [markdown]
# ## What the accumulator takes
#
# Full accumulation keeps a gradient of every parameter between micro-steps. FLORA keeps
# `rank` rows of each matrix; the embedding, biases and norms stay dense.

# %%
sketch = fj.Sketch(config.ranks[0], mask=fj.not_embeddings)
tx = fj.compressed_accumulation(optax.adafactor(1e-3), config.micro_batches, sketch)
print(fj.memory_plan(tx, prepared.params, sketch=sketch))

# %% [markdown]
# ## Training both
#
# `python -m experiments.finetune` is this job as a command; it also writes checkpoints
# and continues from them. Same model, same batches in the same order, same learning
# rate.

# %%
# Hide the progress bar of these one-minute runs; keep it for long ones.
with contextlib.nullcontext() if XSUM else capture_output():
    rows = run(config, prepared)
for row in rows:
    print(
        f"{row['title']:28} state {row['state_bytes'] / 2**20:5.2f} MiB,"
        f" validation loss {row['validation_loss']:.3f}"
    )

# %%
figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 3.3), layout="constrained", width_ratios=(2, 1)
)
styles = zip(rows, (BLUE, ORANGE), ("-", "--"), ("o", "s"), strict=True)
for row, color, style, mark in styles:
    name = row["method"] + ("" if row["rank"] is None else f"-r{row['rank']}")
    file = config.output_dir / name / "metrics.jsonl"
    steps = [json.loads(line) for line in file.read_text().splitlines()]
    losses = [(step["update"], step["loss"]) for step in steps if step["update"]]
    left.plot(*zip(*losses, strict=True), style, color=color, alpha=0.4)
    found = [
        (step["update"], step["validation_loss"])
        for step in steps
        if step.get("validation_loss") is not None
    ]
    left.plot(
        *zip(*found, strict=True), style, marker=mark, color=color, label=row["title"]
    )
    bar = right.bar(row["title"].replace(" ", "\n", 1), row["state_bytes"] / 2**20)
    bar[0].set_color(color)
    right.bar_label(bar, fmt="%.2f")
left.set_xlabel("update")
left.set_ylabel("loss (thin: training, marks: validation)")
left.legend(frameon=False)
left.grid(alpha=0.3)
right.set_ylabel("optimizer state (MiB)")
right.margins(y=0.15)
right.spines[["top", "right"]].set_visible(False)

# %% [markdown]
# ## What the model writes
#
# After so few updates from scratch: not much. The longer runs in
# `docs/benchmarks/finetuning.md` translate.

# %%
name = f"flora_accumulation-r{config.ranks[0]}"
print((config.output_dir / name / "samples.txt").read_text())

# %% [markdown]
# The gap between the curves is the noise of a sketch of 16 rows out of 128, at a
# learning rate that was not tuned for it. `docs/benchmarks/claims.md` compares tuned
# runs, LoRA included. In your own script the accumulator is one line:
# `fj.compressed_accumulation(optax.adafactor(learning_rate), 16, fj.Sketch(256))`.
