"""What LoRA and FLORA do to the weights: `python -m experiments.dynamics`.

Two measurements on a fine-tuning from a checkpoint. First, how close LoRA's change of
a weight stays to the accumulated gradient, projected by the first A (Theorem 2.1 and
Observation 2.2 of the FLORA paper). Second, the spectrum of the whole change at the
end: its effective rank, and the intruder dimensions that it puts among the leading
singular vectors (Shuttleworth et al., 2024, arXiv 2410.21228).
"""

import dataclasses
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import traverse_util
from rich.progress import track

from experiments.common import loop, lora, records
from experiments.common.checkpoints import State
from experiments.common.errors import ConfigError, NonFiniteLossError
from experiments.common.optimizers import matrices_only
from experiments.dynamics import report as dynamics_report
from experiments.finetune.config import Config as FinetuneConfig
from experiments.finetune.config import MethodName
from experiments.finetune.prepare import Prepared, prepare
from experiments.finetune.problem import build
from experiments.main_job.run import versions

Params = dict[str, Any]
_INTRUDER = 0.5  # Largest cosine to any singular vector of before, as in that paper.
_LEADING = 10  # Singular vectors that are looked at, as in that paper.


@dataclasses.dataclass(frozen=True)
class Run:
    """A training whose change of the weights is taken apart."""

    method: MethodName
    rank: int | None
    learning_rate: float


@dataclasses.dataclass(frozen=True)
class Config:
    """All settings."""

    checkpoint: pathlib.Path
    """Folder of the checkpoint to start from: intruder dimensions have no meaning for
    weights from random numbers. `python -m experiments.finetune docstrings --model
    gpt2-tiny --methods none` leaves one in runs/finetune/none/model."""
    output_dir: pathlib.Path = pathlib.Path("runs/dynamics")
    """Where the numbers, the table and the pictures go."""
    data_dir: pathlib.Path = pathlib.Path("runs/data")
    """Where data sets are kept."""
    rank: int = 16
    """LoRA's rank in the first measurement."""
    sgd_rates: tuple[float, ...] = (0.003, 0.01, 0.03)
    """Learning rates of SGD in the first one; the theorem is about small ones."""
    adafactor_rate: float = 0.16
    """Of Adafactor, which the theorem is not about, in the same."""
    runs: tuple[Run, ...] = (
        Run("none", None, 0.08),
        Run("lora_accumulation", 16, 0.16),
        Run("flora_accumulation", 16, 0.08),
        Run("lora_accumulation", 64, 0.16),
        Run("flora_accumulation", 64, 0.08),
    )
    """Trainings of the second measurement, at the rates that were best in
    experiments/results/claims/gpt2.md."""
    updates: int = 300
    """Of every training."""
    batch_size: int = 16
    """Pairs that one update sees."""
    micro_batches: int = 16
    """Parts of a batch in the accumulating methods."""
    seed: int = 0
    """Of data order, adapters and projections."""

    def validate(self) -> None:
        """Refuse settings that make no sense."""
        for name in ("updates", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"`--{name}` must be at least 1, got {getattr(self, name)}"
                )
        if not self.sgd_rates:
            raise ConfigError("`--sgd-rates` names no rate; 0.01 is one")


def run(config: Config) -> None:
    """Makes both measurements and writes them.

    Raises:
        ConfigError: the settings make no sense.
        NonFiniteLossError: a training diverged.
    """
    config.validate()
    task = FinetuneConfig(
        "phrases",
        checkpoint=config.checkpoint,
        data_dir=config.data_dir,
        updates=config.updates,
        batch_size=config.batch_size,
        micro_batches=config.micro_batches,
        source_length=48,  # As in the grid that the rates come from.
        target_length=32,
        seed=config.seed,
    )
    task.validate()
    prepared = prepare(task)
    traces = [
        _trace(config, task, prepared, f"SGD, {rate:g}", optax.sgd(rate))
        for rate in config.sgd_rates
    ]
    adafactor = optax.adafactor(config.adafactor_rate)
    name = f"Adafactor, {config.adafactor_rate:g}"
    traces.append(_trace(config, task, prepared, name, adafactor))
    spectra = [_spectrum(task, prepared, run) for run in config.runs]
    results = {
        "config": dataclasses.asdict(config)
        | {name: str(getattr(config, name)) for name in ("output_dir", "data_dir")}
        | {"checkpoint": str(config.checkpoint)},
        "versions": versions(),
        "traces": traces,
        "spectra": spectra,
    }
    records.write_json(config.output_dir / "dynamics.json", results)
    dynamics_report.write(results, config.output_dir)


def _trace(
    config: Config,
    task: FinetuneConfig,
    prepared: Prepared,
    title: str,
    tx: optax.GradientTransformation,
) -> dict[str, Any]:
    """Cosines between LoRA's change and the projected accumulated gradient.

    With y = x (W + A B), from B = 0 and A = A0, and G the gradient at W + A B, the
    theorem says A0 ΔB = −η A0 A0ᵀ ΣG + O(η²). Both change here, and A B − A0 B0 = A B.
    """
    name, rank = "lora_momentum", config.rank  # Of which only the problem is used.
    problem, state, _ = build(task, prepared, name, rank)
    frozen, first = problem.frozen, _pairs(state.params)

    @jax.jit
    def step(carry: Any, batch: Any) -> Any:
        state, sums = carry
        key = jax.random.key(0)
        loss, (grads, base) = jax.value_and_grad(problem.loss, (0, 1))(
            state.params, frozen, batch, key
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        sums = jax.tree.map(jnp.add, sums, _kernels(base))
        return (State(params, opt_state), sums), loss

    @jax.jit
    def cosine(params: Params, sums: Params) -> jax.Array:
        found = []
        for path, (a, b) in _pairs(params).items():
            start = first[path][0]
            change, ideal = a @ b, -start @ (start.T @ sums[path])
            norms = jnp.linalg.norm(change) * jnp.linalg.norm(ideal)
            found.append(jnp.vdot(change, ideal) / norms)
        return jnp.stack(found).mean()

    carry = (
        State(state.params, tx.init(state.params)),
        jax.tree.map(jnp.zeros_like, _kernels(frozen)),
    )
    points = []
    marks = {round(x) for x in np.geomspace(1, config.updates, 25)}
    for number in track(range(1, config.updates + 1), f"LoRA by {title}"):
        carry, loss = step(carry, problem.batches[number - 1])
        if number in marks:
            _check(title, loss)
            points.append(
                {
                    "update": number,
                    "loss": float(loss),
                    "cosine": float(cosine(carry[0].params, carry[1])),
                }
            )
    return {"title": title, "points": points}


def _check(title: str, loss: jax.Array) -> None:
    if not np.isfinite(loss):
        raise NonFiniteLossError(f"{title}: the loss is {loss}; lower that rate")


def _pairs(params: Params) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The two adapters of each layer, by its path."""
    flat = traverse_util.flatten_dict(params)
    return {
        _name(path[:-1]): (flat[path], flat[(*path[:-1], "lora_b")])
        for path in flat
        if path[-1] == "lora_a"
    }


def _kernels(frozen: Params) -> dict[str, jax.Array]:
    """The kernels below adapters, by the path of their layer."""
    flat = traverse_util.flatten_dict(frozen)
    return {_name(path[:-2]): leaf for path, leaf in flat.items()}


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))  # Layers are numbers.


def _spectrum(task: FinetuneConfig, prepared: Prepared, run: Run) -> dict[str, Any]:
    """Trains once, and takes the change of each matrix apart."""
    task = dataclasses.replace(
        task, learning_rate=run.learning_rate, lora_learning_rate=run.learning_rate
    )
    problem, state, tx = build(task, prepared, run.method, run.rank)
    step = jax.jit(
        lambda state, frozen, batch: loop.training_step(
            problem.loss, tx, state, frozen, batch, jax.random.key(0)
        ),
        donate_argnums=0,
    )
    parts = 1 if run.method == "none" else task.micro_batches
    title = run.method if run.rank is None else f"{run.method} {run.rank}"
    for number in track(range(task.updates), title):
        batch = problem.batches[number]
        for i in range(parts):
            part = jax.tree.map(lambda x: np.split(x, parts)[i], batch)  # noqa: B023
            state, loss = step(state, problem.frozen, part)
    _check(title, loss)
    params = lora.join(state.params, problem.frozen)
    if run.rank is not None and run.method.startswith("lora"):
        params = lora.merge(params, run.rank, task.alpha(run.rank))
    before, after = (
        {_name(path): x for path, x in traverse_util.flatten_dict(tree).items()}
        for tree in (prepared.params, params)
    )
    matrices = {
        path: decompose(np.asarray(before[path]), np.asarray(after[path]))
        for path in before
        if path.endswith("kernel") and matrices_only(path, before[path].shape)
    }
    return {
        "method": run.method,
        "rank": run.rank,
        "learning_rate": run.learning_rate,
        "validation_loss": problem.evaluate(state.params, problem.frozen)[
            "validation_loss"
        ],
        "matrices": matrices,
    }


def decompose(before: np.ndarray, after: np.ndarray) -> dict[str, Any]:
    """Takes the change of a weight apart.

    Args:
        before: the weight, (n, m).
        after: the weight after training.

    Returns:
        "singular_values" of the change, descending; "effective_rank", the exponential
        of the entropy of its normalised singular values (Roy and Vetterli, 2007);
        "intruders", how many of the ten leading left singular vectors after training
        have no cosine of 0.5 or more with any left singular vector of before;
        "relative_change", the quotient of the Frobenius norms.
    """
    values = np.linalg.svd(after - before, compute_uv=False)
    share = values / values.sum()
    share = share[share > 0]
    old, new = (np.linalg.svd(x, full_matrices=False)[0] for x in (before, after))
    closest = np.abs(old.T @ new[:, :_LEADING]).max(axis=0)
    return {
        "singular_values": values.tolist(),
        "effective_rank": float(np.exp(-(share * np.log(share)).sum())),
        "intruders": int((closest < _INTRUDER).sum()),
        "relative_change": float(
            np.linalg.norm(after - before) / np.linalg.norm(before)
        ),
    }
