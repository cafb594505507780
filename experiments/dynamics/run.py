"""What LoRA and FLORA do to the weights.

Two measurements on a fine-tuning from a checkpoint. First, how close LoRA's change of
a weight stays to the accumulated gradient, projected by the first A (Theorem 2.1 and
Observation 2.2 of the FLORA paper). Second, the spectrum of the whole change at the
end: its effective rank, and the intruder dimensions that it puts among the leading
singular vectors (Shuttleworth et al., 2024, arXiv 2410.21228).
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from rich.progress import track

from experiments.common.errors import NonFiniteLossError
from experiments.common.loop import training_step
from experiments.common.methods import METHODS
from experiments.common.problem import build, micro_batches
from experiments.common.report import publish, ranked
from experiments.common.spectra import changes
from experiments.dynamics import report
from experiments.dynamics.config import Config, Run
from experiments.finetune.config import Config as FinetuneConfig
from experiments.finetune.prepare import Prepared, prepare
from experiments.models.build import Params


def run(config: Config) -> None:
    """Makes both measurements and writes them.

    Raises:
        ConfigError: the settings make no sense.
        NonFiniteLossError: a run diverged.
    """
    names = ("checkpoint", "data_dir", "updates", "batch_size", "micro_batches", "seed")
    names += ("dataset", "source_length", "target_length")
    task = FinetuneConfig(**{name: getattr(config, name) for name in names})
    task.validate()
    prepared, learning_rate = prepare(task), config.adafactor_learning_rate
    optimizers = {f"SGD, {x:g}": optax.sgd(x) for x in config.sgd_learning_rates}
    optimizers[f"Adafactor, {learning_rate:g}"] = optax.adafactor(learning_rate)
    trace = functools.partial(_trace, task, prepared, config.rank)
    traces = list(itertools.starmap(trace, optimizers.items()))
    runs = () if config.traces_only else config.runs
    spectra = [_spectrum(task, prepared, run) for run in runs]
    results = {"traces": traces, "spectra": spectra}
    publish(config.output_dir / "dynamics.json", config, results, report.write)


def _trace(
    task: FinetuneConfig, prepared: Prepared, rank: int, title: str, tx: Any
) -> dict[str, Any]:
    """Cosines between LoRA's change and the projected accumulated gradient.

    With y = x (W + A B), from B = 0 and A = A0, and G the gradient at W + A B, the
    theorem says A0 ΔB = −η A0 A0ᵀ ΣG + O(η²). Both change here, and A B − A0 B0 = A B.
    """
    problem, (params, _), _ = build(task, prepared, "lora_momentum", rank)
    frozen, first = problem.frozen, _flat(params)
    value_and_grad = jax.value_and_grad(problem.loss, (0, 1))

    @jax.jit
    def step(params: Any, opt_state: Any, sums: Any, batch: Any) -> Any:
        key = jax.random.key(0)  # There is no dropout here.
        loss, (grads, base) = value_and_grad(params, frozen, batch, key)
        updates, opt_state = tx.update(grads, opt_state, params)
        sums = jax.tree.map(jnp.add, sums, _kernels(base))
        return optax.apply_updates(params, updates), opt_state, sums, loss

    @jax.jit
    def cosine(params: Params, sums: Params) -> jax.Array:
        flat, found = _flat(params), []
        for path, gradients in sums.items():
            change = flat[f"{path}/lora_a"] @ flat[f"{path}/lora_b"]
            start = first[f"{path}/lora_a"]
            ideal = -start @ (start.T @ gradients)
            norms = jnp.linalg.norm(change) * jnp.linalg.norm(ideal)
            found.append(jnp.vdot(change, ideal) / norms)
        return jnp.stack(found).mean()

    sums = jax.tree.map(jnp.zeros_like, _kernels(frozen))
    opt_state, points = tx.init(params), []
    marks = {round(x) for x in np.geomspace(1, task.updates, 25)}
    for number in track(range(1, task.updates + 1), f"LoRA by {title}"):
        batch = problem.batches[number - 1]
        params, opt_state, sums, loss = step(params, opt_state, sums, batch)
        if number in marks:
            _check(title, loss)
            similarity = float(cosine(params, sums))
            points.append({"update": number, "loss": float(loss), "cosine": similarity})
    return {"title": title, "points": points}


def _check(title: str, loss: jax.Array) -> None:
    if not np.isfinite(loss):
        raise NonFiniteLossError(
            f"{title}: the loss is {loss}; lower that learning rate"
        )


def _kernels(frozen: Params) -> dict[str, jax.Array]:
    """The kernels below adapters, by the path of their layer."""
    return {path.removesuffix("/base/kernel"): x for path, x in _flat(frozen).items()}


def _flat(params: Params) -> dict[str, jax.Array]:
    flat = traverse_util.flatten_dict(params)
    return {"/".join(map(str, path)): leaf for path, leaf in flat.items()}


def _spectrum(task: FinetuneConfig, prepared: Prepared, run: Run) -> dict[str, Any]:
    """Trains once, and takes the change of each matrix apart."""
    method = METHODS[run.method]
    peak = run.learning_rate
    task = dataclasses.replace(task, learning_rate=peak, lora_learning_rate=peak)
    problem, state, tx = build(task, prepared, run.method, run.rank)
    step = jax.jit(functools.partial(training_step, problem, tx), donate_argnums=0)
    parts, title = method.micro_batches(task), ranked(method.title, run.rank)
    for number in track(range(task.updates), title):
        for part in micro_batches(problem.batches[number], parts):
            state, loss = step(state, problem.frozen, part, jax.random.key(0))
    _check(title, loss)
    after = problem.merged(state.params, problem.frozen)
    loss = problem.evaluate(state.params, problem.frozen)["validation_loss"]
    matrices = changes(prepared.params, after)
    return dataclasses.asdict(run) | {"validation_loss": loss, "matrices": matrices}
